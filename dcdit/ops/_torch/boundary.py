"""Boundary probabilities, with gradients that save little."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops.autograd import first_derivative_only
from dcdit.ops.numerics import NORM_EPS, upcast


def boundary_prob_cosine(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if q.shape[-2] == 0:
        return upcast(q).sum(-1)
    cosine = _Cosine.apply(upcast(q)[..., :-1, :], upcast(k)[..., 1:, :])
    p = F.pad(_dissimilarity(cosine), (1, 0), value=1.0)
    if cu_seqlens is None:
        return p
    first = torch.zeros(q.shape[0] + 1, dtype=torch.bool, device=q.device).index_fill(0, cu_seqlens.long(), True)
    return p.masked_fill(first[:-1], 1.0)


def boundary_prob_cosine2d(q: Tensor, k: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    b, _, d = q.shape
    k_hat = _Unit.apply(upcast(k))
    # (B, L, D) is a channels-last image already, so nothing moves in memory.
    k_grid = k_hat.reshape(b, *grid, d).permute(0, 3, 1, 2)
    k_bar = F.conv2d(k_grid, upcast(weight)[:, None], padding=1, groups=d).permute(0, 2, 3, 1).reshape(q.shape)
    return _dissimilarity((_Unit.apply(upcast(q)) * k_bar).sum(-1))


def boundary_prob_predictability(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_groups: int,
    eps: float,
) -> Tensor:
    x = upcast(features)
    x = F.silu(F.group_norm(x, num_groups, norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps))
    p = torch.sigmoid(torch.matmul(out_weight.to(x.dtype), x.flatten(2)) + out_bias.to(x.dtype))
    position = torch.arange(p.shape[1], device=p.device)
    return p.masked_fill((position == 0) | (position == p.shape[1] - 1), 1.0)


class _Cosine(torch.autograd.Function):
    """Cosine of pairs of rows. Its gradient is a combination of the two rows, so only the rows themselves are saved."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        norm_a, norm_b = (torch.linalg.vector_norm(x, dim=-1).clamp(min=NORM_EPS) for x in (a, b))
        cosine = (a * b).sum(-1) / norm_a / norm_b
        ctx.save_for_backward(a, b, norm_a, norm_b, cosine)
        return cosine

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b, norm_a, norm_b, cosine = ctx.saved_tensors
        of_product = (grad / norm_a / norm_b)[..., None]

        def of_norm(norm: Tensor) -> Tensor:
            # A clamped norm is a constant: it passes no gradient.
            return torch.where(norm > NORM_EPS, -grad * cosine / norm / norm, 0)[..., None]

        return torch.addcmul(of_product * b, of_norm(norm_a), a), torch.addcmul(of_product * a, of_norm(norm_b), b)


class _Unit(torch.autograd.Function):
    """Rows divided by their norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=NORM_EPS)
        unit = x / norm
        ctx.save_for_backward(unit, norm)
        return unit

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        unit, norm = ctx.saved_tensors
        # A clamped norm is a constant: it passes no gradient.
        g_dot_unit = torch.where(norm > NORM_EPS, (grad * unit).sum(-1, keepdim=True), 0)
        return torch.addcmul(grad, g_dot_unit, unit, value=-1).div_(norm)


def _dissimilarity(cosine: Tensor) -> Tensor:
    """``(1 - cosine) / 2`` in [0, 1]; rounding can take a cosine past 1."""
    return ((1 - cosine) / 2).clamp(0, 1)
