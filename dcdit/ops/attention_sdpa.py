"""Varlen attention on ``scaled_dot_product_attention``: for every device and dtype, without an extra package."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops.attention_kernels import repeat_heads
from dcdit.ops.autocast import without_autocast
from dcdit.ops.namespace import add_op_namespace_prefix
from dcdit.ops.numerics import upcast
from dcdit.ops.sizes import known_true


def sdpa_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    causal: bool,
    padding: bool,
) -> Tensor:
    """One batched call where all lengths are equal, else one call per sequence; arguments of ``varlen_attention``.

    Without padding, ``T == B * max_seqlen`` proves that the lengths are equal. Otherwise the lengths are read from
    ``cu_seqlens`` on the host: free on a CPU, one synchronisation on a GPU.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
    equal = lengths_are_equal(q, cu_seqlens, max_seqlen, padding)
    if equal and (cu_seqlens_k is cu_seqlens or lengths_are_equal(k, cu_seqlens_k, max_seqlen_k, padding)):
        images = cu_seqlens.shape[0] - 1
        of_q, of_k = (images, max_seqlen), (images, max_seqlen_k)
        out = _fused_attention(q.unflatten(0, of_q), k.unflatten(0, of_k), v.unflatten(0, of_k), causal)
        out = out.flatten(0, 1)
        # The backward reads the result of the kernel. A copy may be changed in place before that.
        return out.clone() if out.requires_grad else out
    if torch.compiler.is_compiling():
        # The loop runs over lengths, which are data: the compiler sees one custom op instead of it.
        return _varlen_sdpa(q, k, v, cu_seqlens, cu_seqlens_k, causal)
    return _call_per_sequence(q, k, v, cu_seqlens, cu_seqlens_k, causal)


def lengths_are_equal(q: Tensor, cu_seqlens: Tensor, max_seqlen: int, padding: bool) -> bool:
    """Whether the sizes alone prove that all sequences of q (T, ...) are ``max_seqlen`` long."""
    return not padding and known_true(q.shape[0] == (cu_seqlens.shape[0] - 1) * max_seqlen)


def zeros_for(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros like q, as a function of q, k and v, whatever they hold."""
    return q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0) + (k[:0].sum() + v[:0].sum())


def _blind(q_length: int, k_length: int, causal: bool) -> int:
    """How many q see no k: the last q sees all of k, the one before all but the last, and so on."""
    return max(0, q_length - k_length) if causal or k_length == 0 else 0


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention of (B, L, heads, d_h) on one of PyTorch's fused kernels, which need channels that lie side by side.

    On a GPU their number must also be a multiple of 8. Otherwise PyTorch would run plain products, whose gradients it
    rounds if the backward runs under autocast.
    """
    width, seen = q.shape[-1], None
    if q.shape[1] != k.shape[1]:
        if k.shape[1] == 0:
            return zeros_for(q, k, v)
        if blind := _blind(q.shape[1], k.shape[1], causal):
            return F.pad(_fused_attention(q[:, blind:], k, v, causal), (0, 0, 0, 0, blind, 0))
        if causal:
            seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
            causal = False
    missing = -width % 8 if q.is_cuda else 0
    q, k, v = (F.pad(x, (0, missing)) if missing else x for x in (q, k, v))
    q, k, v = ((x if known_true(x.stride(-1) == 1) else x.contiguous()).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal, scale=width**-0.5)
    return out.transpose(1, 2)[..., :width]


def _call_per_sequence(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, causal: bool
) -> Tensor:
    """(T, heads, d_h), zeros in padding rows."""
    starts, starts_k = cu_seqlens.tolist(), cu_seqlens_k.tolist()
    out = []
    for (lo, hi), (lo_k, hi_k) in zip(pairwise(starts), pairwise(starts_k), strict=True):
        out.append(_fused_attention(q[None, lo:hi], k[None, lo_k:hi_k], v[None, lo_k:hi_k], causal)[0])
    return torch.cat([*out, q.new_zeros(q.shape[0] - starts[-1], *q.shape[1:])])


@torch.library.custom_op(add_op_namespace_prefix("varlen_sdpa"), mutates_args=())
def _varlen_sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, causal: bool) -> Tensor:
    with without_autocast(q):
        return _call_per_sequence(q, k, v, cu_seqlens, cu_seqlens_k, causal)


@torch.library.custom_op(add_op_namespace_prefix("varlen_sdpa_backward"), mutates_args=())
def _varlen_sdpa_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(q):
        return _gradients_per_sequence(grad, q, k, v, cu_seqlens, cu_seqlens_k, causal)


def _gradients_per_sequence(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # Autograd is switched off inside a custom op, so the gradient is written out. The scores are computed again, one
    # sequence at a time.
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for (lo, hi), (lo_k, hi_k) in zip(pairwise(cu_seqlens.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        lo += _blind(hi - lo, hi_k - lo_k, causal)
        grad_i, q_i = (upcast(x[lo:hi]).transpose(0, 1) for x in (grad, q))  # [H, M, d_h]
        k_i, v_i = (upcast(x[lo_k:hi_k]).transpose(0, 1) for x in (k, v))  # [H, M_k, d_h]
        scale = q.shape[-1] ** -0.5
        scores = q_i @ k_i.mT * scale  # [H, M, M_k]
        if causal:
            later = torch.ones_like(scores, dtype=torch.bool).triu(1 + scores.shape[2] - scores.shape[1])
            scores = scores.masked_fill(later, float("-inf"))
        weight = scores.softmax(-1)
        grad_weight = grad_i @ v_i.mT
        grad_scores = weight * (grad_weight - (weight * grad_weight).sum(-1, keepdim=True)) * scale
        grad_q[lo:hi] = (grad_scores @ k_i).transpose(0, 1)
        grad_k[lo_k:hi_k] = (grad_scores.mT @ q_i).transpose(0, 1)
        grad_v[lo_k:hi_k] = (weight.mT @ grad_i).transpose(0, 1)
    return grad_q, grad_k, grad_v


@_varlen_sdpa.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, causal: bool) -> Tensor:
    return q.new_empty(q.shape)


@_varlen_sdpa_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return (*_varlen_sdpa_backward(grad, *ctx.saved_tensors, ctx.causal), None, None, None)


_varlen_sdpa.register_autograd(_backward, setup_context=_setup_context)
