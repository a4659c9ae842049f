"""The losses of one forward pass of training: diffusion, compression ratio, dynamic width, distillation."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcdit.config import OptimSection, TrainConfig, WidthSection
from dcdit.diffusion import NoisyBatch, Objective
from dcdit.models import DCDiT, Routing, SparseDiT
from dcdit.models.flops import flops_share
from dcdit.nn import Gates
from dcdit.ops import ratio_loss
from dcdit.train.distill import Teacher
from dcdit.train.schedule import compression_target, drop_fraction, trains_complete, width_target
from dcdit.utils.modules import unwrap_model


def training_losses(
    config: TrainConfig,
    step: int,
    net: Any,
    objective: Objective,
    noisy: NoisyBatch,
    y: Tensor,
    teacher: Teacher | None,
    gate_noise: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Means over the images of one forward pass.

    Args:
        step: steps done before this one.
        net: the model, or a wrapper around it.
        noisy: the images, from ``objective.noise``.
        y: (B,) labels, some of them dropped.
        teacher: of an upcycled model in its warm-up.
        gate_noise: (B, depth, n) for a model of dynamic width.

    Returns:
        Metrics () by name, of which ``loss`` is minimised; and the number of kept tokens of each image (B,) integer, of
        a SparseDiT its sparse ones, or None for a static model.
    """
    ran = _forward(config, step, net, noisy, y, teacher, gate_noise)
    metrics, lengths = losses_of(config, step, unwrap_model(net), objective, noisy, ran)
    if ran.gates is not None and trains_complete(config.width, step):
        with autocast(config.optim, y.device):
            out = net(noisy.x, noisy.time, y, **ran.options, complete=True)
        complete = objective.loss(out.float(), noisy)["loss"].mean()
        metrics["loss"] = metrics["loss"] + complete
        metrics["complete_loss"] = complete
    return metrics, lengths


class Ran(NamedTuple):
    """What a forward pass of training returns."""

    out: Tensor
    options: dict[str, Any]
    """Of a DC-DiT, with which it was called: the drop fraction of each image (B,)."""
    routing: Routing | None = None
    """Of a DC-DiT."""
    gates: Gates | None = None
    """Of a model of dynamic width."""
    distill: Tensor | None = None
    """() the loss of the teacher, if there is one."""
    probs: Tensor | None = None
    """(B, modules, L): of the routers of a SparseDiT."""


def losses_of(
    config: TrainConfig, step: int, model: Any, objective: Objective, noisy: NoisyBatch, ran: Ran
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What :func:`training_losses` returns, from a forward pass that is done. No pass of the complete model."""
    diffusion = objective.loss(ran.out.float(), noisy)["loss"].mean()
    metrics = {"loss": diffusion, "diffusion_loss": diffusion}
    lengths: Tensor | None = None
    if ran.routing is not None:
        routing, router, lengths = ran.routing, config.router, ran.routing.selection.lengths
        ratio = ratio_loss(routing.prob, routing.natural_mask, compression_target(router, step), router.group_size)
        metrics["loss"] = metrics["loss"] + router.loss_weight * ratio
        metrics |= {
            "ratio_loss": ratio,
            "kept": routing.mask.float().mean(),
            "natural": routing.natural_mask.float().mean(),
            "drop_fraction": ran.options["drop_fraction"][0],
        }
    if isinstance(model, SparseDiT):
        times = noisy.time.tolist()
        lengths = torch.tensor([model.config.sparse_tokens_at(time) for time in times], device=noisy.x.device)
    if ran.probs is not None and lengths is not None:
        ratio = sparse_ratio_loss(ran.probs, lengths)
        metrics["loss"] = metrics["loss"] + config.router.loss_weight * ratio
        metrics |= {"ratio_loss": ratio, "natural": (ran.probs > 0.5).float().mean()}
    if ran.distill is not None:
        metrics["loss"] = metrics["loss"] + config.upcycle.distill_weight * ran.distill
        metrics["distill_loss"] = ran.distill
    if ran.gates is not None:
        share = flops_share(model.config, ran.gates, lengths)
        width = width_loss(config.width, step, share, ran.gates)
        metrics["loss"] = metrics["loss"] + config.width.loss_weight * width
        metrics |= {"width_loss": width, "flops_share": share.mean()}
    return metrics, lengths


def _forward(
    config: TrainConfig,
    step: int,
    net: Any,
    noisy: NoisyBatch,
    y: Tensor,
    teacher: Teacher | None,
    gate_noise: Tensor | None,
) -> Ran:
    model, inputs = unwrap_model(net), (noisy.x, noisy.time, y)
    gated = model.config.gate_shape is not None
    noise = {"gate_noise": gate_noise} if gated else {}
    with autocast(config.optim, y.device):
        if isinstance(model, SparseDiT) and model.config.router is not None:
            out, probs = net(*inputs, return_probs=True)
            return Ran(out, {}, probs=probs)
        if not isinstance(model, DCDiT):
            out, gates = net(*inputs, **noise, return_gates=True) if gated else (net(*inputs), None)
            return Ran(out, {}, gates=gates)
        rho = drop_fraction(config.router, config.optim.seed, step)
        options = {"drop_fraction": torch.full(y.shape, rho, device=y.device)}
        asked = {"return_routing": True, "return_states": teacher is not None}
        out, routing, *states = net(*inputs, **options, **noise, **asked)
        distill = None if teacher is None else teacher.loss(noisy.x, states[0], routing.selection)
        return Ran(out, options, routing, routing.gates, distill)


def sparse_ratio_loss(probs: Tensor, counts: Tensor) -> Tensor:
    """The ratio loss of the routers of a SparseDiT, averaged over them and over the images.

    The target of an image is the compression that its number of sparse tokens is. Each image is a group of its own,
    for that is what a fixed number of tokens asks of it.

    Args:
        probs: (B, modules, L) float32.
        counts: (B,) integer, sparse tokens of each image.
    """
    total = probs.new_zeros(())
    for count in set(counts.tolist()):
        p = probs[counts == count].flatten(0, 1)
        total = total + len(p) * ratio_loss(p, p > 0.5, probs.shape[2] / count, group_size=1)
    return total / (probs.shape[0] * probs.shape[1])


def width_loss(width: WidthSection, step: int, share: Tensor, gates: Gates) -> Tensor:
    """``(mean share - target)^2``, averaged over groups of images, and a penalty for too few tokens (arXiv 2410.03456).

    The penalty is what the share of the tokens that pass an MLP lacks to ``least_tokens``, added up over the blocks and
    averaged over the images.

    Args:
        step: steps done; the target falls in the first ones (:func:`dcdit.train.schedule.width_target`).
        share: (B,) of each image, from :func:`dcdit.models.flops.flops_share`.
        gates: of these images.
    """
    groups = share.view(-1, width.group_size or len(share)).mean(1)
    loss = (groups - width_target(width, step)).square().mean()
    if gates.tokens is None:
        return loss
    return loss + (width.least_tokens - gates.tokens.mean(2)).clamp(min=0).sum(1).mean()


def autocast(optim: OptimSection, device: torch.device) -> torch.autocast:
    """The context of a forward pass in ``optim.precision``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=optim.precision == "bf16")
