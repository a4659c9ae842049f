"""Boundary probabilities: the three routers as DC-DiT (arXiv 2603.06351) and H-Net (arXiv 2507.07955) write them."""

from functools import partial

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from dcdit import ops
from dcdit.profiling.workloads.core import Arguments, Call, Case, Inputs, Operation

GROUPS = 8


def _cosine(inputs: Inputs) -> Arguments:
    return {"q": inputs.tokens(), "k": inputs.tokens()}


def _packed_cosine(inputs: Inputs) -> Arguments:
    return {"q": inputs.source_rows(), "k": inputs.source_rows(), "cu_seqlens": inputs.source_cu_seqlens()}


def _plain_cosine(q: Tensor, k: Tensor) -> Call:
    def call() -> Tensor:
        before, here = F.normalize(q[:, :-1].float(), dim=-1), F.normalize(k[:, 1:].float(), dim=-1)
        similarity = einsum(before, here, "b l d, b l d -> b l")
        return F.pad(((1 - similarity) / 2).clamp(0, 1), (1, 0), value=1.0)

    return call


def _cosine2d(inputs: Inputs, weight_dtype: torch.dtype | None = None) -> Arguments:
    q, k, weight = inputs.tokens(), inputs.tokens(), inputs.normal(inputs.shape.width, 3, 3, dtype=weight_dtype)
    return {"q": q, "k": k, "weight": weight, "grid": inputs.shape.grid}


def _plain_cosine2d(q: Tensor, k: Tensor, weight: Tensor, grid: tuple[int, int]) -> Call:
    def call() -> Tensor:
        query, key = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
        image = rearrange(key, "b (h w) d -> b d h w", h=grid[0])
        around = F.conv2d(image, weight.float()[:, None], padding=1, groups=q.shape[2])
        similarity = (query * rearrange(around, "b d h w -> b (h w) d")).sum(-1)
        return ((1 - similarity) / 2).clamp(0, 1)

    return call


def _predictability(
    inputs: Inputs, channels_last: bool = True, parameter_dtype: torch.dtype | None = None
) -> Arguments:
    shape, channels = inputs.shape, max(inputs.shape.width // 32, 1) * GROUPS  # the router works at a quarter of D
    if channels_last:  # as the router's convolution leaves it
        features = rearrange(inputs.normal(shape.batch, *shape.grid, channels), "b h w c -> b c h w")
    else:
        features = inputs.normal(shape.batch, channels, *shape.grid)
    return {
        "features": features.detach().requires_grad_(),
        "norm_weight": inputs.normal(channels, dtype=parameter_dtype),
        "norm_bias": inputs.normal(channels, dtype=parameter_dtype),
        "out_weight": inputs.normal(channels, dtype=parameter_dtype),
        "out_bias": inputs.normal(1, dtype=parameter_dtype),
    }


def _plain_predictability(
    features: Tensor, norm_weight: Tensor, norm_bias: Tensor, out_weight: Tensor, out_bias: Tensor
) -> Call:
    def call() -> Tensor:
        normed = F.group_norm(features.float(), GROUPS, norm_weight.float(), norm_bias.float(), 1e-5)
        logit = F.conv2d(F.silu(normed), rearrange(out_weight.float(), "c -> 1 c 1 1"), out_bias.float())
        p = torch.sigmoid(rearrange(logit, "b 1 h w -> b (h w)")).clone()
        p[:, 0] = 1.0
        p[:, -1] = 1.0
        return p

    return call


_TENSORS = ("features", "norm_weight", "norm_bias", "out_weight", "out_bias")

OPERATIONS = (
    Operation(
        ops.boundary_prob_cosine,
        plain=_plain_cosine,
        cases={"default": Case(_cosine), "packed": Case(_packed_cosine)},
        forward_reads=("q", "k"),
        backward_reads=("q", "k"),
        backward_writes=("q", "k"),
    ),
    Operation(
        ops.boundary_prob_cosine2d,
        plain=_plain_cosine2d,
        cases={
            "default": Case(_cosine2d),
            "frozen": Case(_cosine2d, gradients=("q", "k")),
            "float32": Case(partial(_cosine2d, weight_dtype=torch.float32)),
            "float32_frozen": Case(partial(_cosine2d, weight_dtype=torch.float32), gradients=("q", "k")),
        },
        forward_reads=("q", "k", "weight"),
        backward_reads=("q", "k", "weight"),
        backward_writes=("q", "k", "weight"),
    ),
    Operation(
        ops.boundary_prob_predictability,
        plain=_plain_predictability,
        cases={
            "default": Case(_predictability),
            "float32": Case(partial(_predictability, parameter_dtype=torch.float32)),
            "contiguous": Case(partial(_predictability, channels_last=False, parameter_dtype=torch.float32)),
        },
        forward_reads=_TENSORS,
        backward_reads=("features", "norm_weight", "norm_bias", "out_weight"),
        backward_writes=_TENSORS,
    ),
)
