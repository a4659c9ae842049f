"""Measuring what a router keeps, for the sizes of a static buffer (:func:`dcdit.models.plan_capacity`)."""

from typing import Any

from torch import Tensor

from dcdit.checkpoint import Model
from dcdit.diffusion import sample
from dcdit.diffusion.guidance import Fraction
from dcdit.models import DCDiT, KeptShare
from dcdit.sample.budget import PILOT_STEPS
from dcdit.sample.drawing import clips
from dcdit.sample.model_calls import ModelCalls, call_times
from dcdit.sample.options import Guidance, SamplingOptions


def measure_kept_share(
    model: DCDiT,
    labels: Tensor,
    num_steps: int | str,
    method: str,
    guidance: Guidance | None = None,
    drop_fraction: Fraction | None = None,
    *,
    seed: int = 0,
    clip: bool = False,
    progress: bool = True,
) -> KeptShare:
    """The share of its positions that the router keeps of an image before dropping, and its spread over images.

    From a short run of the sampler on one batch, like the pilot of :func:`dcdit.sample.measure_costs`: of its calls the
    one that kept most. With guidance, both branches count. ``model.kept_share`` is where ``capacity="auto"`` looks for
    it.

    Args:
        labels: (B,) integer, on the model's device. The more, the better the spread is known.
        num_steps, method, seed, clip, progress: of the run, see :func:`dcdit.diffusion.sample`.
        guidance: of the run.
        drop_fraction: of the run; dropping changes what the router sees at the next step.

    Raises:
        ValueError: one image only, or an option that the sampler does not accept.

    Example:
        >>> import torch
        >>> from dcdit.models import create_model
        >>> from dcdit.sample import measure_kept_share
        >>> model = create_model("DC-DiT-S", grid=(4, 4), hidden_size=128, depth=1, num_heads=2, num_classes=10).eval()
        >>> _ = torch.nn.init.constant_(model.router.out.bias, 20.0)  # a router that keeps everything
        >>> share = measure_kept_share(model, torch.tensor([3, 7]), 2, "euler", progress=False)
        >>> share.mean, share.std, share.images
        (1.0, 0.0, 2)
    """
    guidance = guidance or Guidance()
    calls = ModelCalls(model, len(labels))
    drop: Any = drop_fraction
    if drop is not None and guidance.null_drop_fraction is not None:
        drop = (drop, guidance.null_drop_fraction)
    steps = min(PILOT_STEPS, len(call_times(method, num_steps)))
    sample(
        calls,
        labels,
        steps,
        method,
        cfg_scale=guidance.scale,
        cfg_interval=guidance.interval,
        drop_fraction=drop,
        clip=clip,
        seed=seed,
        progress=progress,
    )
    return KeptShare.of_calls(calls.natural_shares())


def ensure_kept_share(model: Model, options: SamplingOptions, labels: Tensor, progress: bool = True) -> None:
    """Set ``model.kept_share`` where the options need it and nobody measured it: from one batch of these labels.

    Args:
        labels: (N,) integer, on the model's device. Fewer than a batch, or than two images, are repeated.
    """
    if options.capacity != "auto" or not isinstance(model, DCDiT) or model.kept_share is not None:
        return
    batch = max(2, options.batch_size)
    model.kept_share = measure_kept_share(
        model,
        labels.repeat(-(-batch // len(labels)))[:batch],
        options.steps,
        options.method,
        options.guidance,
        seed=options.seed,
        clip=clips(model, options.method),
        progress=progress,
    )
