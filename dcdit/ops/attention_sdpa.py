"""Varlen attention on ``scaled_dot_product_attention``: for every device and dtype, without an extra package."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops.autocast import without_autocast
from dcdit.ops.namespace import add_op_namespace_prefix
from dcdit.ops.numerics import upcast
from dcdit.ops.sizes import known_true


def sdpa_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, padding: bool
) -> Tensor:
    """One batched call where all lengths are equal, else one call per sequence; arguments of ``varlen_attention``.

    Without padding, ``T == B * max_seqlen`` proves that the lengths are equal. Otherwise the lengths are read from
    ``cu_seqlens`` on the host: free on a CPU, one synchronisation on a GPU.
    """
    images = cu_seqlens.shape[0] - 1
    if not padding and known_true(q.shape[0] == images * max_seqlen):
        shape = (images, max_seqlen)
        out = _fused_attention(q.unflatten(0, shape), k.unflatten(0, shape), v.unflatten(0, shape), causal)
        out = out.flatten(0, 1)
        # The backward reads the result of the kernel. A copy may be changed in place before that.
        return out.clone() if out.requires_grad else out
    if torch.compiler.is_compiling():
        # The loop runs over lengths, which are data: the compiler sees one custom op instead of it.
        return _varlen_sdpa(q, k, v, cu_seqlens, causal)
    return _call_per_sequence(q, k, v, cu_seqlens, causal)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention of (B, L, heads, d_h) on one of PyTorch's fused kernels, which need channels that lie side by side.

    On a GPU their number must also be a multiple of 8. Otherwise PyTorch would run plain products, whose gradients it
    rounds if the backward runs under autocast.
    """
    width = q.shape[-1]
    missing = -width % 8 if q.is_cuda else 0
    q, k, v = (F.pad(x, (0, missing)) if missing else x for x in (q, k, v))
    q, k, v = ((x if known_true(x.stride(-1) == 1) else x.contiguous()).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=width**-0.5).transpose(1, 2)[..., :width]


def _call_per_sequence(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    """(T, heads, d_h), zeros in padding rows."""
    starts = cu_seqlens.tolist()
    out = []
    for lo, hi in pairwise(starts):
        out.append(_fused_attention(q[None, lo:hi], k[None, lo:hi], v[None, lo:hi], causal)[0])
    return torch.cat([*out, q.new_zeros(q.shape[0] - starts[-1], *q.shape[1:])])


@torch.library.custom_op(add_op_namespace_prefix("varlen_sdpa"), mutates_args=())
def _varlen_sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    with without_autocast(q):
        return _call_per_sequence(q, k, v, cu_seqlens, causal)


@torch.library.custom_op(add_op_namespace_prefix("varlen_sdpa_backward"), mutates_args=())
def _varlen_sdpa_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(q):
        return _gradients_per_sequence(grad, q, k, v, cu_seqlens, causal)


def _gradients_per_sequence(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # Autograd is switched off inside a custom op, so the gradient is written out. The scores are computed again, one
    # sequence at a time.
    grads = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    starts = cu_seqlens.tolist()
    for lo, hi in pairwise(starts):
        grad_i, q_i, k_i, v_i = (upcast(x[lo:hi]).transpose(0, 1) for x in (grad, q, k, v))  # [H, M, d_h]
        scale = q.shape[-1] ** -0.5
        scores = q_i @ k_i.mT * scale  # [H, M, M]
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        weight = scores.softmax(-1)
        grad_weight = grad_i @ v_i.mT
        grad_scores = weight * (grad_weight - (weight * grad_weight).sum(-1, keepdim=True)) * scale
        for out, value in zip(grads, (grad_scores @ k_i, grad_scores.mT @ q_i, weight.mT @ grad_i), strict=True):
            out[lo:hi] = value.transpose(0, 1)
    return grads[0], grads[1], grads[2]


@_varlen_sdpa.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    return q.new_empty(q.shape)


@_varlen_sdpa_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return (*_varlen_sdpa_backward(grad, *ctx.saved_tensors, ctx.causal), None, None)


_varlen_sdpa.register_autograd(_backward, setup_context=_setup_context)
