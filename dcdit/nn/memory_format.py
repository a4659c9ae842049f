"""The two views of one memory: tokens (B, L, D), and the grid (B, D, H, W) in channels-last order."""

from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def to_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, L, D) -> (B, D, H, W) without a copy; contiguous tokens become a channels-last grid."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, L, D) without a copy where x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def channels_last(model: Model) -> Model:
    """Store convolution weights channels-last, in place: then neither they nor the grid are converted on the way."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
