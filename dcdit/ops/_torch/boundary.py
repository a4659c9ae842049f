"""Boundary probabilities, with gradients that save little."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops._torch import host_reads
from dcdit.ops._torch.group_norm import group_norm
from dcdit.ops.autograd import apply, first_derivative_only, matmul
from dcdit.ops.numerics import LARGE, NORM_EPS, shrinking_factor, upcast_all


def boundary_prob_cosine(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    q, k = upcast_all(q, k)
    length = q.shape[-2]
    cosine = apply(_Cosine, *_rows_and_norms(q[..., : length - 1, :]), *_rows_and_norms(k[..., 1:, :]))
    p = F.pad(_dissimilarity(cosine), (min(length, 1), 0), value=1.0)
    if cu_seqlens is None:
        return p
    first = torch.zeros(length + 1, dtype=torch.bool, device=q.device).index_fill(0, cu_seqlens.long(), True)
    return p.masked_fill(first[:-1], 1.0)


def boundary_prob_cosine2d(q: Tensor, k: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    b, _, d = q.shape
    q, k, weight = upcast_all(q, k, weight)
    k_hat = apply(_Unit, *_rows_and_norms(k))
    if k.numel() == 0:  # a convolution needs a position
        k_bar = k_hat * weight.sum()
    else:
        # (B, L, D) is a channels-last image already, so nothing moves in memory.
        k_grid = k_hat.reshape(b, *grid, d).permute(0, 3, 1, 2)
        k_bar = F.conv2d(k_grid, weight[:, None], padding=1, groups=d).permute(0, 2, 3, 1).reshape(q.shape)
    return _dissimilarity((apply(_Unit, *_rows_and_norms(q)) * k_bar).sum(-1))


def boundary_prob_predictability(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_groups: int,
    eps: float,
) -> Tensor:
    x, norm_weight, norm_bias, out_weight, out_bias = upcast_all(
        features.flatten(2), norm_weight, norm_bias, out_weight, out_bias
    )
    images, channels, length = x.shape
    channels_last = x.stride(1) == 1
    if channels_last or x.numel() == 0:
        x = F.silu(group_norm(x.mT, num_groups, norm_weight, norm_bias, eps)).mT
    else:
        x = F.silu(torch.group_norm(x, num_groups, norm_weight, norm_bias, eps))
    if channels_last and not torch.compiler.is_compiling():
        rows = x.mT.reshape(1, images * length, channels)
        logit = matmul(rows, out_weight[None, :, None]).view(images, length)
    else:
        # Faster where the positions are adjacent, and the compiler makes one pass of this and what is above. A backward
        # that it compiled would round a matrix product under autocast.
        logit = (x * out_weight[:, None]).sum(1)
    p = torch.sigmoid(logit + out_bias)
    position = torch.arange(length, device=p.device)
    return p.masked_fill((position == 0) | (position == length - 1), 1.0)


def _rows_and_norms(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x (..., D), shrunk where their squares would overflow, and their norms (..., 1), at least 1e-12."""
    norm = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
    if not (host_reads.reads_are_free(x) and _squares_fit(norm)):
        x = x * shrinking_factor(norm)
        norm = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
    return x, norm.clamp(min=NORM_EPS)


def _squares_fit(norm: Tensor) -> bool:
    """Whether no row is to be shrunk; reads a number on the host."""
    return norm.numel() == 0 or norm.max().item() <= LARGE


class _Cosine(torch.autograd.Function):
    """Cosine of pairs of rows. Its gradient is a combination of the two rows, so only the rows themselves are saved."""

    @staticmethod
    def forward(a: Tensor, norm_a: Tensor, b: Tensor, norm_b: Tensor) -> Tensor:
        return (a * b).sum(-1) / norm_a.squeeze(-1) / norm_b.squeeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        a, norm_a, b, norm_b, cosine = ctx.saved_tensors
        grad, cosine = grad[..., None], cosine[..., None]
        of_product = grad / norm_a / norm_b

        def of_norm(norm: Tensor) -> Tensor:
            # A clamped norm is a constant: it passes no gradient.
            return torch.where(norm > NORM_EPS, -grad * cosine / norm / norm, 0)

        grad_a = torch.addcmul(of_product * b, of_norm(norm_a), a)
        return grad_a, None, torch.addcmul(of_product * a, of_norm(norm_b), b), None


class _Unit(torch.autograd.Function):
    """Rows divided by their norm."""

    @staticmethod
    def forward(x: Tensor, norm: Tensor) -> Tensor:
        return x / norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        unit, norm = ctx.saved_tensors
        # A clamped norm is a constant: it passes no gradient.
        g_dot_unit = torch.where(norm > NORM_EPS, (grad * unit).sum(-1, keepdim=True), 0)
        return torch.addcmul(grad, g_dot_unit, unit, value=-1).div_(norm), None


def _dissimilarity(cosine: Tensor) -> Tensor:
    """``(1 - cosine) / 2`` in [0, 1]; rounding can take a cosine past 1."""
    return ((1 - cosine) / 2).clamp(0, 1)
