"""Checks of a model's inputs. Every message names the value and what is accepted."""

import torch
from torch import Tensor

from dcdit.models.config import ModelConfig
from dcdit.ops import checks
from dcdit.utils.text import shape_of


def check_inputs(config: ModelConfig, x: Tensor, t: Tensor, y: Tensor) -> None:
    """x is (B, C, H, W), t is (B,), y is (B,) of integers in range. The range is checked where that costs no sync.

    Raises:
        TypeError: no tensor.
        ValueError: a shape, a dtype or a label that is not accepted.
    """
    for name, tensor in (("x", x), ("t", t), ("y", y)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; accepted: a tensor")
    expected = (config.in_channels, *config.grid)
    if x.dim() != 4 or tuple(x.shape[1:]) != expected:
        raise ValueError(f"x has shape {shape_of(x)}; accepted: (B, {', '.join(map(str, expected))})")
    batch = x.shape[0]
    for name, tensor in (("t", t), ("y", y)):
        if tuple(tensor.shape) != (batch,):
            raise ValueError(f"{name} has shape {shape_of(tensor)}; accepted: ({batch},), one entry per image of x")
    if y.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"y has dtype {y.dtype}; accepted: int64 or int32 class labels")
    highest = config.num_classes if config.class_dropout_prob > 0 else config.num_classes - 1
    if checks.value_checks_enabled(y) and batch and not 0 <= int(y.min()) <= int(y.max()) <= highest:
        null = f" ({highest} is the null class)" if config.class_dropout_prob > 0 else ""
        raise ValueError(f"y holds labels {int(y.min())} to {int(y.max())}; accepted: 0 to {highest}{null}")
