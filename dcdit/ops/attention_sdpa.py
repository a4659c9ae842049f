"""Varlen attention on ``scaled_dot_product_attention``: every device and dtype, no extra package."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def sdpa_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, padding: bool
) -> Tensor:
    """One batched call where all lengths are equal, else one call per sequence.

    Without padding, ``T == B * max_seqlen`` proves equal lengths on the host. Otherwise the lengths are read from
    ``cu_seqlens``: free on a CPU, one synchronisation on a GPU.
    """
    images = cu_seqlens.shape[0] - 1
    if not padding and known(q.shape[0] == images * max_seqlen):
        q, k, v = (x.unflatten(0, (images, max_seqlen)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(0, 1)
    if torch.compiler.is_compiling():
        # Lengths are data: the compiler sees one opaque op instead of the loop.
        return torch.ops.dcdit.varlen_sdpa(q, k, v, cu_seqlens, causal)
    return _ragged(q, k, v, cu_seqlens, causal)


def known(condition: bool | torch.SymBool) -> bool:
    """Whether it holds; False where the compiler cannot tell, because T is a size that depends on data."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(condition)
    return bool(condition)


def _ragged(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    starts = cu_seqlens.tolist()
    out = []
    for lo, hi in pairwise(starts):
        q_i, k_i, v_i = (x[None, lo:hi].transpose(1, 2) for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(q_i, k_i, v_i, is_causal=causal).transpose(1, 2)[0])
    return torch.cat([*out, q.new_zeros(q.shape[0] - starts[-1], *q.shape[1:])])


@torch.library.custom_op("dcdit::varlen_sdpa", mutates_args=())
def _varlen_sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool) -> Tensor:
    return _ragged(q, k, v, cu_seqlens, causal)


@torch.library.custom_op("dcdit::varlen_sdpa_backward", mutates_args=())
def _varlen_sdpa_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # Autograd is switched off inside a custom op, so the gradient is written out. It recomputes the scores of one
    # sequence at a time.
    wide = torch.promote_types(q.dtype, torch.float32)
    grads = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    starts = cu_seqlens.tolist()
    for lo, hi in pairwise(starts):
        grad_i, q_i, k_i, v_i = (x[lo:hi].transpose(0, 1).to(wide) for x in (grad, q, k, v))  # [H, M, d_h]
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
