"""The random numbers of a step, drawn for its whole batch.

Every process draws the same numbers, and every forward pass takes the rows of its images. So the result does not depend
on how the batch is split, and a resumed run draws what the uninterrupted one would have drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dcdit.diffusion import Objective
from dcdit.nn.gates import logistic_noise
from dcdit.train.schedule import NOISE, seed_of


class StepDraws(NamedTuple):
    """Random numbers of B images."""

    t: Tensor
    """(B,) times, as the objective takes them."""
    noise: Tensor
    """(B, C, H, W)"""
    dropped: Tensor
    """(B,) bool: which images lose their label."""
    gate_noise: Tensor | None
    """(B, depth, n): of the gates of a model of dynamic width."""

    def rows(self, first: int, count: int) -> "StepDraws":
        """Those of the images ``first`` to ``first + count - 1``."""
        t, noise, dropped = (values[first : first + count] for values in self[:3])
        gate_noise = None if self.gate_noise is None else self.gate_noise[first : first + count]
        return StepDraws(t, noise, dropped, gate_noise)


def draw_step(
    objective: Objective,
    shape: Sequence[int],
    dropout: float,
    seed: int,
    step: int,
    device: torch.device,
    gates: tuple[int, int] | None = None,
) -> StepDraws:
    """The random numbers of a step.

    Args:
        shape: (B, C, H, W) of the whole batch.
        dropout: the chance that an image loses its label.
        seed: of the run.
        gates: (depth, n) of an image, ``model.config.gate_shape``.
    """
    generator = torch.Generator(device).manual_seed(seed_of(seed, NOISE, step))
    t, noise = objective.draw(shape, device, generator)
    chance = torch.rand(shape[0], device=device, generator=generator)
    gate_noise = None if gates is None else logistic_noise((shape[0], *gates), device, generator)
    return StepDraws(t, noise, chance < dropout, gate_noise)
