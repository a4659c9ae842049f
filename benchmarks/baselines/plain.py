"""The published formulation of every operation in plain PyTorch: sorts, dense distances, rows expanded per token.

What a straightforward implementation of DC-DiT (arXiv 2603.06351) and H-Net (arXiv 2507.07955) does, padded batches
(B, M, D) with M the longest kept length included. Each function takes the arguments of the public operation, prepares
what an implementation would have at hand by then, and returns the call to time.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops import TokenSelection

PROB_EPS = 1e-4
ROW_EPS = 1e-8
Call = Callable[[], Tensor | tuple[Tensor, ...]]


def boundary_prob_cosine(q: Tensor, k: Tensor, cu_seqlens: None) -> Call:
    def call() -> Tensor:
        before, here = F.normalize(q[:, :-1].float(), dim=-1), F.normalize(k[:, 1:].float(), dim=-1)
        similarity = torch.einsum("bld,bld->bl", before, here)
        return F.pad(((1 - similarity) / 2).clamp(0, 1), (1, 0), value=1.0)

    return call


def boundary_prob_cosine2d(q: Tensor, k: Tensor, weight: Tensor, grid: tuple[int, int]) -> Call:
    def call() -> Tensor:
        query, key = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
        image = key.transpose(1, 2).unflatten(2, grid)
        around = F.conv2d(image, weight.float()[:, None], padding=1, groups=q.shape[2]).flatten(2).transpose(1, 2)
        return ((1 - (query * around).sum(-1)) / 2).clamp(0, 1)

    return call


def boundary_prob_predictability(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_groups: int,
    eps: float,
) -> Call:
    def call() -> Tensor:
        normed = F.group_norm(features.float(), num_groups, norm_weight.float(), norm_bias.float(), eps)
        logit = F.conv2d(F.silu(normed), out_weight.float()[None, :, None, None], out_bias.float())
        p = torch.sigmoid(logit.flatten(1)).clone()
        p[:, 0] = 1.0
        p[:, -1] = 1.0
        return p

    return call


def select_tokens(
    p: Tensor,
    cu_seqlens: None = None,
    threshold: float = 0.5,
    drop_fraction: float = 0.0,
    budget: None = None,
    capacity: int | None = None,
) -> Call:
    """Returns mask, natural mask, lengths, cu_seqlens, sorted positions (B, M) and which of them are real."""
    length = p.shape[1]

    def call() -> tuple[Tensor, ...]:
        natural = mask = torch.stack((1 - p, p), dim=-1).argmax(-1) == 1
        if drop_fraction > 0:
            rank = p.masked_fill(~natural, torch.inf).argsort(dim=1).argsort(dim=1)
            drop = (natural.sum(1, keepdim=True).float() * drop_fraction).long()
            mask = natural & (rank >= drop)
        lengths = mask.sum(1)
        longest = int(lengths.max())
        others = p.masked_fill(mask, -torch.inf)
        last = length + (-others).argsort(dim=1).argsort(dim=1)
        position = torch.arange(length, device=p.device)
        order = torch.where(mask, position, last).argsort(dim=1)[:, :longest]
        real = torch.arange(longest, device=p.device) < lengths[:, None]
        return mask, natural, lengths, F.pad(lengths.cumsum(0), (1, 0)).int(), order, real

    return call


def gather_tokens(x: Tensor, sel: TokenSelection, bias: Tensor | None) -> Call:
    order, real = padded(sel)

    def call() -> Tensor:
        tokens = x.gather(1, order[:, :, None].expand(-1, -1, x.shape[2]))[real]
        if bias is None:
            return tokens
        table = bias.expand(x.shape[0], -1, -1).gather(1, order[:, :, None].expand(-1, -1, x.shape[2]))
        return (tokens.float() + table[real]).to(x.dtype)

    return call


def scatter_tokens(t: Tensor, sel: TokenSelection, fill: float) -> Call:
    def call() -> Tensor:
        out = t.new_full((*sel.mask.shape, t.shape[1]), fill)
        out[sel.mask] = t
        return out

    return call


def dechunk_spatial(
    h: Tensor,
    p: Tensor,
    sel: TokenSelection,
    grid: tuple[int, int],
    sigma: float,
    gate: Tensor,
    residual: Tensor,
) -> Call:
    order, real = padded(sel)
    length = p.shape[1]

    def call() -> Tensor:
        tokens = _pad(h, real)
        confidence = p.float().clamp(PROB_EPS, 1 - PROB_EPS).gather(1, order)
        row, col = (order // grid[1]).float(), (order % grid[1]).float()
        apart = (row[:, :, None] - row[:, None]) ** 2 + (col[:, :, None] - col[:, None]) ** 2
        weight = torch.exp(-apart / (2 * sigma**2)) * confidence[:, None]
        weight = weight * (real[:, None] & real[:, :, None]).float()
        weight = weight / (weight.sum(-1, keepdim=True) + ROW_EPS)
        own = confidence[:, :, None]
        smoothed = own * tokens + (1 - own) * torch.bmm(weight, tokens)
        position = torch.arange(length, device=h.device)
        down, across = (position // grid[1]).float()[:, None], (position % grid[1]).float()[:, None]
        distance = (down - row[:, None]) ** 2 + (across - col[:, None]) ** 2
        nearest = distance.masked_fill(~real[:, None], torch.inf).argmin(2)
        return _plug_back(smoothed, nearest, gate, residual)

    return call


def dechunk_ema(h: Tensor, p: Tensor, sel: TokenSelection, gate: Tensor, residual: Tensor) -> Call:
    """The scan as one dense lower triangular product per image."""
    order, real = padded(sel)

    def call() -> Tensor:
        tokens = _pad(h, real)
        confidence = p.float().clamp(PROB_EPS, 1 - PROB_EPS).gather(1, order)
        # Differences of float32 sums are off by 1e-4 after a thousand tokens.
        decay = torch.log1p(-confidence).double().cumsum(1)
        later = torch.ones(order.shape[1], order.shape[1], dtype=torch.bool, device=h.device).tril()
        weight = (decay[:, :, None] - decay[:, None]).float().masked_fill(~later, -torch.inf).exp() * confidence[
            :, None
        ]
        return plug_back_last(torch.bmm(weight, tokens), sel, gate, residual)

    return call


def plug_back_last(states: Tensor, sel: TokenSelection, gate: Tensor, residual: Tensor) -> Tensor:
    """Every position takes the state (B, M, D) of the last kept token at or before it."""
    held = sel.mask.cumsum(1)
    before_first = (held == 0)[:, :, None]
    out = states.gather(1, (held - 1).clamp(min=0)[:, :, None].expand(-1, -1, states.shape[2]))
    return _gate_and_add(out.masked_fill(before_first, 0.0), gate, residual)


def ratio_loss(p: Tensor, natural_mask: Tensor, target: float) -> Call:
    def call() -> Tensor:
        kept, mean = natural_mask.float().mean(), p.float().mean()
        return ((1 - kept) * (1 - mean) + kept * mean * (target - 1)) * target / (target - 1)

    return call


def modulated_layer_norm(t: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor) -> Call:
    def call() -> Tensor:
        return _modulate(t, *_per_token(cu_seqlens, shift, scale))

    return call


def gated_add(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Call:
    def call() -> Tensor:
        (rows,) = _per_token(cu_seqlens, gate)
        return x + rows * y

    return call


def gated_add_modulated_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor
) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        gate_rows, shift_rows, scale_rows = _per_token(cu_seqlens, gate, shift, scale)
        added = x + gate_rows * y
        return added, _modulate(added, shift_rows, scale_rows)

    return call


def create_call(name: str, args: tuple[Any, ...]) -> Call:
    """The plain call of a workload of :mod:`dcdit.profiling.workloads`, on its arguments."""
    return PLAIN[name](*args)


PLAIN: dict[str, Callable[..., Call]] = {
    "boundary_prob_cosine": boundary_prob_cosine,
    "boundary_prob_cosine2d": boundary_prob_cosine2d,
    "boundary_prob_predictability": boundary_prob_predictability,
    "select_tokens": select_tokens,
    "select_tokens_drop": select_tokens,
    "gather_tokens": gather_tokens,
    "scatter_tokens": scatter_tokens,
    "dechunk_spatial": dechunk_spatial,
    "dechunk_ema": dechunk_ema,
    "ratio_loss": ratio_loss,
    "modulated_layer_norm": modulated_layer_norm,
    "gated_add": gated_add,
    "gated_add_modulated_layer_norm": gated_add_modulated_layer_norm,
}


def padded(sel: TokenSelection) -> tuple[Tensor, Tensor]:
    """Kept positions of each image, raster order, padded to the longest (B, M), and which of them are real."""
    length, longest = sel.mask.shape[1], int(sel.lengths.max())
    position = torch.arange(length, device=sel.mask.device)
    order = torch.where(sel.mask, position, length + position).argsort(dim=1)[:, :longest]
    return order, torch.arange(longest, device=order.device) < sel.lengths[:, None]


def _pad(h: Tensor, real: Tensor) -> Tensor:
    """(T, D) -> (B, M, D) float32, zeros in the padding."""
    out = h.new_zeros((*real.shape, h.shape[1]), dtype=torch.float32)
    out[real] = h.float()
    return out


def _plug_back(states: Tensor, nearest: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    return _gate_and_add(states.gather(1, nearest[:, :, None].expand(-1, -1, states.shape[2])), gate, residual)


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


def _per_token(cu_seqlens: Tensor, *tables: Tensor) -> list[Tensor]:
    lengths = cu_seqlens.diff()
    return [table.repeat_interleave(lengths, dim=0) for table in tables]


def _modulate(t: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(t, t.shape[-1:], eps=1e-6) * (1 + scale) + shift
