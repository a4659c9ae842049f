"""The random numbers of a step, drawn for its whole batch.

Every process draws the same numbers, and every forward pass takes the rows of its images. So the result does not depend
on how the batch is split, and a resumed run draws what the uninterrupted one would have drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dcdit.diffusion import Objective
from dcdit.train.schedule import NOISE, seed_of


class StepDraws(NamedTuple):
    """Random numbers of B images."""

    t: Tensor
    """(B,) times, as the objective takes them."""
    noise: Tensor
    """(B, C, H, W)"""
    dropped: Tensor
    """(B,) bool: which images lose their label."""

    def rows(self, first: int, count: int) -> "StepDraws":
        """Those of the images ``first`` to ``first + count - 1``."""
        return StepDraws(*(values[first : first + count] for values in self))


def draw_step(
    objective: Objective, shape: Sequence[int], dropout: float, seed: int, step: int, device: torch.device
) -> StepDraws:
    """The random numbers of a step.

    Args:
        shape: (B, C, H, W) of the whole batch.
        dropout: the chance that an image loses its label.
        seed: of the run.
    """
    generator = torch.Generator(device).manual_seed(seed_of(seed, NOISE, step))
    t, noise = objective.draw(shape, device, generator)
    chance = torch.rand(shape[0], device=device, generator=generator)
    return StepDraws(t, noise, chance < dropout)
