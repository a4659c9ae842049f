"""De-chunking with dense (B, M, M) weights and (B, L, M) distances, M the longest kept length, as published.

The spatial one is that of DC-DiT (arXiv 2603.06351), the moving average that of H-Net (arXiv 2507.07955, section 2.2).
"""

from functools import partial
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import avg_pool2d

from dcdit import ops
from dcdit.ops import TokenSelection
from dcdit.ops.numerics import PROB_EPS, ROW_EPS
from dcdit.profiling.workloads.core import Arguments, Call, Case, Inputs, Operation
from dcdit.profiling.workloads.packing import padded_positions, real_rows

SIGMA = 1.0


def _ema(
    inputs: Inputs, packed: bool = False, gated: bool = True, padded: bool = False, extra_tokens: int = 0
) -> Arguments:
    """A grid batch or a packed source, with gate and residual or without, with padding rows or without."""
    p = inputs.packed_probabilities() if packed else inputs.probabilities()
    starts = inputs.source_cu_seqlens() if packed else None
    capacity = p.numel() + inputs.shape.batch * extra_tokens if padded else None
    sel = ops.select_tokens(p, starts, capacity=capacity, extra_tokens=extra_tokens)
    arguments: Arguments = {"h": inputs.packed(sel), "p": p, "sel": sel}
    if gated:
        arguments["gate"] = torch.maximum(p, 1 - p).detach().requires_grad_()
        arguments["residual"] = inputs.normal(*sel.mask.shape, inputs.shape.width)
    return arguments


def _spatial(inputs: Inputs, gated: bool = True, padded: bool = False, extra_tokens: int = 0) -> Arguments:
    made = _ema(inputs, gated=gated, padded=padded, extra_tokens=extra_tokens)
    return {**made, "grid": inputs.shape.grid, "sigma": SIGMA}


def _plain_spatial(
    h: Tensor, p: Tensor, sel: TokenSelection, grid: tuple[int, int], sigma: float, gate: Tensor, residual: Tensor
) -> Call:
    order, real = padded_positions(sel)
    rows, length = real_rows(real), p.shape[1]

    def call() -> Tensor:
        tokens = pad_tokens(h, order.shape, rows)
        q = p.float().clamp(PROB_EPS, 1 - PROB_EPS).gather(1, order)
        row, col = (order // grid[1]).float(), (order % grid[1]).float()
        squared = (row[:, :, None] - row[:, None]) ** 2 + (col[:, :, None] - col[:, None]) ** 2
        weight = torch.exp(-squared / (2 * sigma**2)) * q[:, None]
        weight = weight * (real[:, None] & real[:, :, None]).float()
        weight = weight / (weight.sum(-1, keepdim=True) + ROW_EPS)
        own = q[:, :, None]
        smoothed = own * tokens + (1 - own) * torch.bmm(weight, tokens)
        position = torch.arange(length, device=h.device)
        down, across = (position // grid[1]).float()[:, None], (position % grid[1]).float()[:, None]
        distance = (down - row[:, None]) ** 2 + (across - col[:, None]) ** 2
        nearest = distance.masked_fill(~real[:, None], torch.inf).argmin(2)
        return _plug_back_nearest(smoothed, nearest, gate, residual)

    return call


def _plain_ema(h: Tensor, p: Tensor, sel: TokenSelection, gate: Tensor, residual: Tensor) -> Call:
    """The scan as one dense lower triangular product for each image."""
    order, real = padded_positions(sel)
    rows = real_rows(real)

    def call() -> Tensor:
        tokens = pad_tokens(h, order.shape, rows)
        q = p.float().clamp(PROB_EPS, 1 - PROB_EPS).gather(1, order)
        # Differences of float32 sums are off by 1e-4 after a thousand tokens.
        decay = torch.log1p(-q).double().cumsum(1)
        earlier = torch.ones(order.shape[1], order.shape[1], dtype=torch.bool, device=h.device).tril()
        log_weight = (decay[:, :, None] - decay[:, None]).float().masked_fill(~earlier, -torch.inf)
        states = torch.bmm(log_weight.exp() * q[:, None], tokens)
        return plug_back_last(states, sel, gate, residual)

    return call


def pad_tokens(h: Tensor, shape: torch.Size, rows: Tensor) -> Tensor:
    """(T, D) -> (B, M, D) float32, zeros in the padding; ``rows`` as :func:`real_rows` returns them."""
    out = h.new_zeros((shape.numel(), h.shape[1]), dtype=torch.float32)
    out[rows] = h.float()
    return out.view(*shape, h.shape[1])


def _plug_back_nearest(states: Tensor, nearest: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """Every position takes the state (B, M, D) of its nearest kept token. One function, so that it is one graph."""
    return _gate_and_add(states.gather(1, repeat(nearest, "b l -> b l d", d=states.shape[2])), gate, residual)


def plug_back_last(states: Tensor, sel: TokenSelection, gate: Tensor, residual: Tensor) -> Tensor:
    """Every position takes the state (B, M, D) of the last kept token at or before it."""
    count = sel.mask.cumsum(1)
    last = repeat((count - 1).clamp(min=0), "b l -> b l d", d=states.shape[2])
    before_first = rearrange(count == 0, "b l -> b l 1")
    return _gate_and_add(states.gather(1, last).masked_fill(before_first, 0.0), gate, residual)


def _gate_and_add(out: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return (out * _StraightThrough.apply(gate)[:, :, None] + residual.float()).to(residual.dtype)


class _StraightThrough(torch.autograd.Function):
    """Ones forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor) -> Tensor:
        return torch.ones_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _smoothing_flops(h: Tensor, p: Tensor, sel: TokenSelection, grid: tuple[int, int], sigma: float, **_: Any) -> int:
    """2 D for each pair of kept tokens whose weight float32 can tell from zero (6 sigma)."""
    reach = int(6 * sigma)
    kept = rearrange(sel.mask.float(), "b (h w) -> b 1 h w", h=grid[0])
    within = avg_pool2d(kept, 2 * reach + 1, 1, reach, divisor_override=1)
    return int(2 * h.shape[1] * (within * kept).double().sum())


OPERATIONS = (
    Operation(
        ops.dechunk_spatial,
        plain=_plain_spatial,
        cases={
            "default": Case(_spatial),
            "ungated": Case(partial(_spatial, gated=False)),
            "tokens_only": Case(partial(_spatial, gated=False), gradients=("h",)),
            "frozen_tokens": Case(_spatial, gradients=("p", "gate")),
            "gate_only": Case(_spatial, gradients=("gate",)),
            "padded": Case(partial(_spatial, padded=True)),
            "inference": Case(partial(_spatial, padded=True), gradients=()),
            "extra_tokens": Case(partial(_spatial, padded=True, extra_tokens=2)),
        },
        forward_reads=("h", "p", "residual"),
        backward_reads=("h", "p"),
        backward_writes=("h", "p", "gate"),
        flops=_smoothing_flops,
    ),
    Operation(
        ops.dechunk_ema,
        plain=_plain_ema,
        cases={
            "default": Case(_ema),
            "ungated": Case(partial(_ema, gated=False)),
            "tokens_only": Case(_ema, gradients=("h",)),
            "gate_only": Case(_ema, gradients=("gate",)),
            "padded": Case(partial(_ema, padded=True)),
            "extra_tokens": Case(partial(_ema, extra_tokens=1)),
            "packed": Case(partial(_ema, packed=True)),
            "packed_ungated": Case(partial(_ema, packed=True, gated=False)),
            "packed_tokens_only": Case(partial(_ema, packed=True), gradients=("h",)),
            "packed_gate_only": Case(partial(_ema, packed=True), gradients=("gate",)),
        },
        forward_reads=("h", "p", "residual"),
        backward_reads=("h", "p"),
        backward_writes=("h", "p", "gate"),
    ),
)
