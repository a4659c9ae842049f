"""Boundary probabilities."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops._torch._common import wide

NORM_EPS = 1e-12


def boundary_prob_cosine(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if q.shape[-2] == 0:
        return wide(q).sum(-1)
    p = _half_angle(_cosine(wide(q)[..., :-1, :], wide(k)[..., 1:, :]))
    p = F.pad(p, (1, 0), value=1.0)
    if cu_seqlens is None:
        return p
    first = torch.zeros(q.shape[0] + 1, dtype=torch.bool, device=q.device)
    first[cu_seqlens.long()] = True
    return p.masked_fill(first[:-1], 1.0)


def boundary_prob_cosine2d(q: Tensor, k: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    b, _, d = q.shape
    q_hat, k_hat = F.normalize(wide(q), dim=-1), F.normalize(wide(k), dim=-1)
    # (B, L, D) is a channels-last image already: no transpose is copied.
    k_grid = k_hat.reshape(b, *grid, d).permute(0, 3, 1, 2)
    k_bar = F.conv2d(k_grid, wide(weight)[:, None], padding=1, groups=d).permute(0, 2, 3, 1).reshape(q.shape)
    return _half_angle((q_hat * k_bar).sum(-1))


def boundary_prob_predictability(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_groups: int,
    eps: float,
) -> Tensor:
    x = wide(features)
    x = F.silu(F.group_norm(x, num_groups, norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps))
    p = torch.sigmoid((x * out_weight.to(x.dtype)[:, None, None]).sum(1).flatten(1) + out_bias.to(x.dtype))
    position = torch.arange(p.shape[1], device=p.device)
    return p.masked_fill((position == 0) | (position == p.shape[1] - 1), 1.0)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    norms = [torch.linalg.vector_norm(x, dim=-1).clamp(min=NORM_EPS) for x in (a, b)]
    return (a * b).sum(-1) / norms[0] / norms[1]


def _half_angle(cosine: Tensor) -> Tensor:
    return ((1 - cosine) / 2).clamp(0, 1)
