"""The losses of one forward pass of training: diffusion, compression ratio, distillation."""

from typing import Any

import torch
from torch import Tensor

from dcdit.config import OptimSection, TrainConfig
from dcdit.diffusion import NoisyBatch, Objective
from dcdit.models import DCDiT
from dcdit.ops import ratio_loss
from dcdit.train.distill import Teacher
from dcdit.train.schedule import compression_target, drop_fraction
from dcdit.utils.modules import unwrap_model


def training_losses(
    config: TrainConfig,
    step: int,
    net: Any,
    objective: Objective,
    noisy: NoisyBatch,
    y: Tensor,
    teacher: Teacher | None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Means over the images of one forward pass.

    Args:
        step: steps done before this one.
        net: the model, or a wrapper around it.
        noisy: the images, from ``objective.noise``.
        y: (B,) labels, some of them dropped.
        teacher: of an upcycled model in its warm-up.

    Returns:
        Metrics () by name, of which ``loss`` is minimised; and the number of kept tokens of each image (B,) integer, or
        None for a static model.
    """
    if not isinstance(unwrap_model(net), DCDiT):
        with autocast(config.optim, y.device):
            out = net(noisy.x, noisy.time, y)
        loss = objective.loss(out.float(), noisy)["loss"].mean()
        return {"loss": loss, "diffusion_loss": loss}, None

    router = config.router
    rho = torch.full(y.shape, drop_fraction(router, config.optim.seed, step), device=y.device)
    options = {"drop_fraction": rho, "return_routing": True, "return_states": teacher is not None}
    distill: Tensor | None = None
    with autocast(config.optim, y.device):
        out, routing, *states = net(noisy.x, noisy.time, y, **options)
        if teacher is not None:
            distill = teacher.loss(noisy.x, states[0], routing.selection)
    diffusion = objective.loss(out.float(), noisy)["loss"].mean()
    ratio = ratio_loss(routing.prob, routing.natural_mask, compression_target(router, step), router.group_size)
    loss = diffusion + router.loss_weight * ratio
    if distill is not None:
        loss = loss + config.upcycle.distill_weight * distill
    metrics = {
        "loss": loss,
        "diffusion_loss": diffusion,
        "ratio_loss": ratio,
        "kept": routing.mask.float().mean(),
        "natural": routing.natural_mask.float().mean(),
        "drop_fraction": rho[0],
    }
    if distill is not None:
        metrics["distill_loss"] = distill
    return metrics, routing.selection.lengths


def autocast(optim: OptimSection, device: torch.device) -> torch.autocast:
    """The context of a forward pass in ``optim.precision``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=optim.precision == "bf16")
