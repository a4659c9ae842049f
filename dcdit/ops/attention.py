"""Attention inside each sequence of a packed batch, on the fastest kernel of this machine."""

from operator import index

import torch
from torch import Tensor

from dcdit.ops import attention_kernels, checks
from dcdit.ops.attention_sdpa import sdpa_varlen
from dcdit.ops.autocast import without_autocast
from dcdit.ops.backend import backend_for, backend_name
from dcdit.ops.numerics import widest
from dcdit.ops.sizes import known_true
from dcdit.utils.deprecation import warn_renamed
from dcdit.utils.text import shape_of

__all__ = ["varlen_attention"]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool = False,
    backend: str = "auto",
    padding: bool = False,
    slack: bool | None = None,
) -> Tensor:
    """``softmax(q k^T / sqrt(d_h)) v`` inside each sequence, never across sequences.

    ``"auto"`` takes the first of these that can run: ``"flash3"`` (Hopper), ``"flash4"`` (Blackwell, Hopper),
    ``"flash2"``, ``"torch_varlen"`` (torch >= 2.10), ``"sdpa"``. The first four need a GPU and float16 or bfloat16.
    float32 runs on ``"sdpa"`` and is never rounded. Under ``torch.compile``, ``"auto"`` skips kernels that the compiler
    cannot trace. To run FlashAttention 3 or 4 there, call ``torch.nn.attention.activate_flash_attention_impl`` and use
    ``"torch_varlen"``.

    ``"sdpa"`` is one batched call where all lengths are equal (``T == B * max_seqlen`` and no padding). Otherwise it is
    one call per sequence and reads ``cu_seqlens`` on the host, which on a GPU is a synchronisation.

    Args:
        q, k, v: (T, heads, d_h) packed tokens.
        cu_seqlens: int32 (B+1,), the row at which each sequence starts. It ends at T unless ``padding``. Sequences may
            be empty.
        max_seqlen: length of the longest sequence, or an upper bound (the kernels then also start empty blocks).
        causal: position i sees positions up to i.
        backend: one of the names above.
        padding: rows past ``cu_seqlens[-1]`` are padding. They come back as zeros and get zero gradients; what they
            hold, NaN included, reaches nothing. On the GPU kernels this costs a masked copy of q, k, v and the result,
            which the transformer of this package does without: its padding rows are never NaN.
        slack: the former name of ``padding``.

    Returns:
        (T, heads, d_h) in the widest dtype of q, k and v, in which all is computed. Differentiable in q, k and v. The
        backward of the first four kernels reads the result: changed in place before it, the result is an error there.
        Their gradients repeat to the bit only under ``torch.use_deterministic_algorithms(True)``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; max_seqlen below the longest sequence (on a GPU
            only with ``DCDIT_CHECK=1``); an unknown backend, or one that cannot run here.
    """
    if slack is not None:
        warn_renamed("slack=", "padding=")
        padding = slack
    _check(q, k, v, cu_seqlens, max_seqlen, backend, padding)
    dtype = widest(q, k, v)
    with without_autocast(q):
        return attend(q.to(dtype), k.to(dtype), v.to(dtype), cu_seqlens, max_seqlen, causal, backend, padding)


def attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, backend: str, padding: bool
) -> Tensor:
    """:func:`varlen_attention` of checked arguments, outside of autocast."""
    name = kernel_for(q, cu_seqlens, backend)
    if name is not None:
        checks.check_int32(f"attention backend {name!r}", cu_seqlens=cu_seqlens)
        if not padding:
            return attention_kernels.run_kernel(name, q, k, v, cu_seqlens, max_seqlen, causal)
        # The kernels do not write padding rows of outputs and gradients. They may read v past the end of a sequence
        # with weight 0, and 0 times NaN is NaN.
        is_token = (torch.arange(q.shape[0], device=q.device) < cu_seqlens[-1])[:, None, None]
        q, k, v = (torch.where(is_token, x, 0.0) for x in (q, k, v))
        out = attention_kernels.run_kernel(name, q, k, v, cu_seqlens, max_seqlen, causal)
        return torch.where(is_token, out, 0.0)
    if _no_sequence(q, cu_seqlens):
        # Return zeros that depend on q, k and v for autograd, whatever the rows hold.
        return (q + k + v).masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)
    if backend_name(q) == "reference":
        return backend_for(q).varlen_attention(q, k, v, cu_seqlens, max_seqlen, causal, padding)
    return sdpa_varlen(q, k, v, cu_seqlens, max_seqlen, causal, padding)


def kernel_for(q: Tensor, cu_seqlens: Tensor, backend: str = "auto") -> str | None:
    """The name of the attention kernel to run; None where another implementation computes the attention.

    Args:
        q: (T, ..., heads, d_h).
        cu_seqlens: int32 (B+1,).
        backend: as in :func:`varlen_attention`.
    """
    if _no_sequence(q, cu_seqlens) or backend_name(q) == "reference":
        return None
    # Under torch.compile(dynamic=True) the head dimension is a symbol; index() makes it a constant.
    head_dim, compiling = index(q.shape[-1]), torch.compiler.is_compiling()
    name = attention_kernels.choose_attention_backend(backend, q.device, q.dtype, head_dim, compiling)
    return None if name == "sdpa" else name


def _no_sequence(q: Tensor, cu_seqlens: Tensor) -> bool:
    return known_true(q.shape[0] == 0) or cu_seqlens.shape[0] == 1


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str, padding: bool) -> None:
    checks.check_float(q=q, k=k, v=v)
    if q.dim() != 3:
        raise ValueError(f"q has shape {shape_of(q)}; accepted: packed heads (T, heads, d_h)")
    checks.check_not_empty("q", q, 1, "head")
    checks.check_not_empty("q", q, 2, "channel")
    checks.check_shape("k", k, tuple(q.shape), "the shape of q")
    checks.check_shape("v", v, tuple(q.shape), "the shape of q")
    checks.check_device(q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    checks.check_cu_seqlens(cu_seqlens, q.shape[0], exact=not padding)
    accepted = (*attention_kernels.ATTENTION_BACKENDS, "auto")
    if backend not in accepted:
        raise ValueError(f"unknown attention backend {backend!r}; accepted: {', '.join(accepted)}")
    checks.check_max_seqlen(cu_seqlens, max_seqlen)
