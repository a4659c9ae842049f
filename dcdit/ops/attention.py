"""Attention inside each sequence of a packed batch, on the fastest kernel this machine has."""

from operator import index

import torch
from torch import Tensor

from dcdit.ops import checks, reference
from dcdit.ops.attention_kernels import NAMES, attention_backends, choose, run
from dcdit.ops.attention_sdpa import known, sdpa_varlen
from dcdit.ops.backend import backend_name
from dcdit.utils.deprecation import warn_renamed
from dcdit.utils.text import shape_of

__all__ = ["attention_backends", "varlen_attention"]


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

    ``"auto"`` takes the first that can run of ``"flash3"`` (Hopper), ``"flash4"`` (Blackwell, Hopper), ``"flash2"``,
    ``"torch_varlen"`` (torch >= 2.10) and ``"sdpa"``. The first four need a GPU and float16 or bfloat16; float32 runs
    on ``"sdpa"``, never silently rounded. Under ``torch.compile`` auto skips kernels that the compiler cannot trace.
    For FlashAttention 3 or 4 without that restriction, call ``torch.nn.attention.activate_flash_attention_impl`` and
    use ``"torch_varlen"``.

    ``"sdpa"`` runs one batched call when the lengths are equal (``T == B * max_seqlen`` and no padding); otherwise one
    call per sequence, for which it reads ``cu_seqlens`` on the host: on a GPU that is a synchronisation.

    Args:
        q, k, v: (T, heads, d_h) packed tokens of one dtype.
        cu_seqlens: int32 (B+1,), starts of the sequences; empty sequences are fine. It ends at T unless ``padding``.
        max_seqlen: the longest sequence, or an upper bound (a loose one costs the kernels empty blocks).
        causal: position i sees positions up to i.
        backend: one of the names above.
        padding: rows past ``cu_seqlens[-1]`` are padding: they come back zero, get zero gradients, and whatever they
            hold (NaN too) reaches nothing. On the GPU kernels this costs a masked copy of q, k, v and the result.
        slack: the former name of ``padding``.

    Returns:
        (T, heads, d_h) in q's dtype. Differentiable in q, k and v. The backward of the flash kernels is only repeatable
        bit for bit under ``torch.use_deterministic_algorithms(True)``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; max_seqlen below the longest sequence (on a GPU
            only with ``DCDIT_CHECK=1``); an unknown backend, or one that cannot run here.
    """
    if slack is not None:
        warn_renamed("slack=", "padding=")
        padding = slack
    _check(q, k, v, cu_seqlens, max_seqlen, backend, padding)
    if known(q.shape[0] == 0) or cu_seqlens.shape[0] == 1:
        # No sequence: zeros that stay in the autograd graph without reading the rows.
        return (q + k + v).masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)
    if backend_name(q) == "reference":
        return reference.varlen_attention(q, k, v, cu_seqlens, max_seqlen, causal, padding)
    # index() makes a constant of a head dimension that torch.compile(dynamic=True) holds as a symbol.
    name = choose(backend, q.device, q.dtype, index(q.shape[2]), torch.compiler.is_compiling())
    if name == "sdpa":
        return sdpa_varlen(q, k, v, cu_seqlens, max_seqlen, causal, padding)
    if not padding:
        return run(name, q, k, v, cu_seqlens, max_seqlen, causal)
    # The kernels leave padding rows of outputs and gradients unwritten, and may read V past the end of a sequence,
    # where a weight of 0 does not stop a NaN.
    used = (torch.arange(q.shape[0], device=q.device) < cu_seqlens[-1])[:, None, None]
    q, k, v = (torch.where(used, x, 0.0) for x in (q, k, v))
    return torch.where(used, run(name, q, k, v, cu_seqlens, max_seqlen, causal), 0.0)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, backend: str, padding: bool) -> None:
    checks.check_float(q=q, k=k, v=v)
    checks.check_same(q=q, k=k, v=v)
    if q.dim() != 3:
        raise ValueError(f"q has shape {shape_of(q)}; accepted: packed heads (T, heads, d_h)")
    checks.check_shape("k", k, tuple(q.shape), "the shape of q")
    checks.check_shape("v", v, tuple(q.shape), "the shape of q")
    checks.check_device(q=q, cu_seqlens=cu_seqlens)
    checks.check_cu_seqlens(cu_seqlens, q.shape[0], exact=not padding)
    if not isinstance(max_seqlen, int | torch.SymInt):
        raise TypeError(f"max_seqlen is a {type(max_seqlen).__name__}; accepted: an int (a tensor would be a sync)")
    if backend not in (*NAMES, "auto"):
        raise ValueError(f"unknown attention backend {backend!r}; accepted: {', '.join(NAMES)}, auto")
    if checks.value_checks_enabled(cu_seqlens) and cu_seqlens.shape[0] > 1:
        longest = int(cu_seqlens.diff().max())
        if max_seqlen < longest:
            raise ValueError(f"max_seqlen is {max_seqlen} but the longest sequence has {longest} tokens")
