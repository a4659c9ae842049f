"""Varlen attention on ``scaled_dot_product_attention``: for every device and dtype, without an extra package."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops.numerics import upcast


def sdpa_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, padding: bool
) -> Tensor:
    """One batched call where all lengths are equal, else one call per sequence; arguments of ``varlen_attention``.

    Without padding, ``T == B * max_seqlen`` proves that the lengths are equal. Otherwise the lengths are read from
    ``cu_seqlens`` on the host: free on a CPU, one synchronisation on a GPU.
    """
    images = cu_seqlens.shape[0] - 1
    if not padding and known_true(q.shape[0] == images * max_seqlen):
        q, k, v = (x.unflatten(0, (images, max_seqlen)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(0, 1)
    if torch.compiler.is_compiling():
        # The loop runs over lengths, which are data: the compiler sees one custom op instead of it.
        return torch.ops.dcdit.varlen_sdpa(q, k, v, cu_seqlens, causal)
    return _call_per_sequence(q, k, v, cu_seqlens, causal)


def known_true(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds; False where the compiler cannot tell because a size depends on data."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(condition)
    return bool(condition)


def _call_per_sequence(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    """(T, heads, d_h), zeros in padding rows."""
    starts = cu_seqlens.tolist()
    out = []
    for lo, hi in pairwise(starts):
        q_i, k_i, v_i = (x[None, lo:hi].transpose(1, 2) for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(q_i, k_i, v_i, is_causal=causal).transpose(1, 2)[0])
    return torch.cat([*out, q.new_zeros(q.shape[0] - starts[-1], *q.shape[1:])])


@torch.library.custom_op("dcdit::varlen_sdpa", mutates_args=())
def _varlen_sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    return _call_per_sequence(q, k, v, cu_seqlens, causal)


@torch.library.custom_op("dcdit::varlen_sdpa_backward", mutates_args=())
def _varlen_sdpa_backward(
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
    return (*torch.ops.dcdit.varlen_sdpa_backward(grad, *ctx.saved_tensors, ctx.causal), None, None)


_varlen_sdpa.register_autograd(_backward, setup_context=_setup_context)
