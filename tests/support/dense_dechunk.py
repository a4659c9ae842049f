"""The dense formulation of spatial de-chunking: the baseline for time and memory.

As a script, it prints by how many bytes one forward and backward pass raises the peak memory of the process:
``PYTHONPATH=.:tests python -m support.dense_dechunk dense|linear SIDE WIDTH``.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.inputs import randn, random_probs, ste_coefficient
from torch import Tensor

from dcdit import ops
from dcdit.ops import TokenSelection


def dense_dechunk_spatial(
    h: Tensor,
    p: Tensor,
    sel: TokenSelection,
    grid: tuple[int, int],
    sigma: float = 1.0,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """For one image: M x M weights and L x M distances, and no larger temporary."""
    height, width = grid
    row, column = (
        (torch.div(sel.indices, width, rounding_mode="floor")).to(h.dtype),
        (sel.indices % width).to(h.dtype),
    )
    q = p.flatten()[sel.indices].clamp(1e-4, 1 - 1e-4)
    distance = (row[:, None] - row).square_().add_((column[:, None] - column).square_())
    weight = distance.mul_(-1 / (2 * sigma**2)).exp_() * q
    weight = weight / (weight.sum(-1, keepdim=True) + 1e-8)
    rows = q[:, None] * h + (1 - q[:, None]) * (weight @ h)
    del distance, weight
    down = (torch.arange(height, dtype=h.dtype)[:, None] - row).square_()
    across = (torch.arange(width, dtype=h.dtype)[:, None] - column).square_()
    # argmin returns the first of equals, which has the lowest raster index.
    nearest = (down[:, None] + across).flatten(0, 1).argmin(-1)
    out = rows[nearest]
    if gate is not None:
        out = out + out.detach() * (gate - gate.detach()).view(-1, 1)
    if residual is not None:
        out = out + residual[0]
    return out[None]


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "dense": dense_dechunk_spatial,
    "linear": ops.dechunk_spatial,
}


def arguments(side: int, width: int, keep: float = 0.25) -> tuple[Any, ...]:
    p = random_probs(1, side * side, keep=keep)
    sel = ops.select_tokens(p)
    h = randn(sel.indices.numel(), width)
    return h, p, sel, (side, side), 1.0, ste_coefficient(p), randn(1, side * side, width, seed=1)


def forward_backward(fn: Callable[..., Tensor], args: tuple[Any, ...], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.requires_grad_() for x in args if isinstance(x, Tensor)]
    return torch.autograd.grad(fn(*args), leaves, grad)


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def peak_bytes(fn: Callable[..., Tensor], side: int, width: int) -> int:
    """By how much the peak resident size exceeds what the inputs hold (Linux)."""
    forward_backward(fn, arguments(16, width), torch.ones(1, 256, width))
    args, grad = arguments(side, width), torch.ones(1, side * side, width)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    forward_backward(fn, args, grad)
    return _resident("VmHWM") - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(peak_bytes(IMPLEMENTATIONS[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3])))
