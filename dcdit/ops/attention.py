"""Attention inside each sequence of a packed batch, on the fastest kernel of this machine."""

from operator import index

import torch
from torch import Tensor

from dcdit.ops import attention_kernels, checks
from dcdit.ops.attention_sdpa import lengths_are_equal, sdpa_varlen, zeros_for
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
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """``softmax(q k^T / sqrt(d_h)) v`` inside each sequence, never across sequences.

    With ``cu_seqlens_k``, k and v have sequences of their own, as many as q and of any lengths: cross-attention, and
    decoding. k and v may have fewer heads than q: head h of q then reads head ``h // (heads / heads_k)``.

    ``"auto"`` takes the first of these that can run: ``"flash3"`` (Hopper), ``"flash4"`` (Blackwell, Hopper),
    ``"flash2"``, ``"torch_varlen"`` (torch >= 2.10), ``"sdpa"``. The first four need a GPU and float16 or bfloat16.
    float32 runs on ``"sdpa"`` and is never rounded. Under ``torch.compile``, ``"auto"`` skips kernels that the compiler
    cannot trace. To run FlashAttention 3 or 4 there, call ``torch.nn.attention.activate_flash_attention_impl`` and use
    ``"torch_varlen"``.

    ``"sdpa"`` is one batched call where all lengths are equal (``T == B * max_seqlen`` and no padding), as with a
    budget. There ``"auto"`` prefers it in inference to ``"flash2"`` and ``"torch_varlen"``, which are part of it, so
    that it may run on cuDNN, too (``torch.nn.attention.sdpa_kernel``). Otherwise it is one call per sequence and reads
    ``cu_seqlens`` on the host, which on a GPU is a synchronisation.

    Args:
        q: (T, heads, d_h) packed tokens.
        k, v: (T, heads_k, d_h), with cu_seqlens_k (T_k, heads_k, d_h), with heads a multiple of heads_k.
        cu_seqlens: (B+1,), the row at which each sequence starts. It ends at T unless ``padding``. Sequences may
            be empty. int32; ``"sdpa"`` takes int64 too.
        max_seqlen: length of the longest sequence, or an upper bound (the kernels then also start empty blocks).
        causal: position i sees positions up to i. Where k has another length, the last q sees all of k, as in
            flash-attention: position i of q sees those of k up to ``i + len_k - len_q``.
        backend: one of the names above.
        padding: rows past ``cu_seqlens[-1]`` are padding. They come back as zeros and get zero gradients; what they
            hold, NaN included, reaches nothing. On the GPU kernels this costs a masked copy of q, k, v and the result,
            which the transformer of this package does without: its padding rows are never NaN.
        slack: the former name of ``padding``.
        cu_seqlens_k, max_seqlen_k: the same of k and v, where their lengths differ from those of q. Either both or
            none. A q that sees no k gets zeros.

    Returns:
        (T, heads, d_h) in the widest dtype of q, k and v, in which all is computed. Differentiable in q, k and v. The
        backward of the first four kernels reads the result: changed in place before it, the result is an error there.
        Their gradients repeat to the bit only under ``torch.use_deterministic_algorithms(True)``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; max_seqlen below the longest sequence (on a GPU
            only with ``DCDIT_CHECK=1``); an unknown backend, or one that cannot run here.

    Example:
        >>> v = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 8.0]]).view(3, 1, 2)  # an image of one token, one of two
        >>> q = k = torch.zeros(3, 1, 2)  # all scores are equal, so each token gets the mean of its image
        >>> ops.varlen_attention(q, k, v, torch.tensor([0, 1, 3]).int(), max_seqlen=2).view(3, 2).tolist()
        [[1.0, 2.0], [4.0, 6.0], [4.0, 6.0]]
        >>> text = torch.tensor([[6.0, 6.0], [2.0, 9.0]]).view(2, 1, 2)  # a word for each image
        >>> starts, starts_k = torch.tensor([0, 1, 3]).int(), torch.tensor([0, 1, 2]).int()
        >>> cross = ops.varlen_attention(q, text, text, starts, 2, cu_seqlens_k=starts_k, max_seqlen_k=1)
        >>> cross.view(3, 2).tolist()
        [[6.0, 6.0], [2.0, 9.0], [2.0, 9.0]]
    """
    if slack is not None:
        warn_renamed("slack=", "padding=")
        padding = slack
    _check(q, k, v, cu_seqlens, max_seqlen, backend, padding, cu_seqlens_k, max_seqlen_k)
    dtype = widest(q, k, v)
    if cu_seqlens_k is None or max_seqlen_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
    with without_autocast(q):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        return attend(q, k, v, cu_seqlens, max_seqlen, causal, backend, padding, cu_seqlens_k, max_seqlen_k)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    backend: str,
    padding: bool,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
) -> Tensor:
    """:func:`varlen_attention` of checked arguments, outside of autocast."""
    crossed = cu_seqlens_k is not cu_seqlens
    no_key = crossed and known_true(k.shape[0] == 0)
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    dense = not crossed and not wants_gradient and lengths_are_equal(q, cu_seqlens, max_seqlen, padding)
    name = None if no_key else kernel_for(q, cu_seqlens, backend, dense)
    if name is not None:
        checks.check_int32(f"attention backend {name!r}", cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
        sequences = cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k
        if not padding:
            return attention_kernels.run_kernel(name, q, k, v, *sequences, causal)
        # The kernels do not write padding rows of outputs and gradients. They may read v past the end of a sequence
        # with weight 0, and 0 times NaN is NaN.
        is_token = _is_token(q, cu_seqlens)
        is_key = _is_token(k, cu_seqlens_k) if crossed else is_token
        q, k, v = (torch.where(real, x, 0.0) for real, x in ((is_token, q), (is_key, k), (is_key, v)))
        out = attention_kernels.run_kernel(name, q, k, v, *sequences, causal)
        return torch.where(is_token, out, 0.0)
    if no_key or _no_sequence(q, cu_seqlens):
        # Return zeros that depend on q, k and v for autograd, whatever the rows hold.
        return zeros_for(q, k, v)
    if backend_name(q) == "reference":
        return backend_for(q).varlen_attention(
            q, k, v, cu_seqlens, max_seqlen, causal, padding, cu_seqlens_k, max_seqlen_k
        )
    return sdpa_varlen(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, causal, padding)


def _is_token(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    return (torch.arange(x.shape[0], device=x.device) < cu_seqlens[-1])[:, None, None]


def kernel_for(q: Tensor, cu_seqlens: Tensor, backend: str = "auto", dense: bool = False) -> str | None:
    """The name of the attention kernel to run; None where another implementation computes the attention.

    Args:
        q: (T, ..., heads, d_h).
        cu_seqlens: int32 (B+1,).
        backend: as in :func:`varlen_attention`.
        dense: all sequences are known to have the same length, and no gradient is wanted. The dense call would copy its
            result for the backward.
    """
    if _no_sequence(q, cu_seqlens) or backend_name(q) == "reference":
        return None
    # Under torch.compile(dynamic=True) the head dimension is a symbol; index() makes it a constant.
    head_dim, compiling = index(q.shape[-1]), torch.compiler.is_compiling()
    name = attention_kernels.choose_attention_backend(backend, q.device, q.dtype, head_dim, compiling)
    if dense and backend == "auto" and name in attention_kernels.PART_OF_SDPA:
        return None
    return None if name == "sdpa" else name


def _no_sequence(q: Tensor, cu_seqlens: Tensor) -> bool:
    return known_true(q.shape[0] == 0) or cu_seqlens.shape[0] == 1


def _check_keys(q: Tensor, k: Tensor, cu_seqlens_k: Tensor | None) -> None:
    heads = k.shape[1] if k.dim() == 3 else 0
    same_tokens = cu_seqlens_k is not None or k.shape[0] == q.shape[0]
    if heads == 0 or q.shape[1] % heads or k.shape[2] != q.shape[2] or not same_tokens:
        tokens = q.shape[0] if cu_seqlens_k is None else "T_k"
        raise ValueError(
            f"k has shape {shape_of(k)}; accepted: ({tokens}, {q.shape[1]} heads or a divisor, {q.shape[2]} channels)"
        )


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str,
    padding: bool,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
) -> None:
    checks.check_float(q=q, k=k, v=v)
    if q.dim() != 3:
        raise ValueError(f"q has shape {shape_of(q)}; accepted: packed heads (T, heads, d_h)")
    checks.check_not_empty("q", q, 1, "head")
    checks.check_not_empty("q", q, 2, "channel")
    if k.shape != q.shape:
        _check_keys(q, k, cu_seqlens_k)
    checks.check_shape("v", v, tuple(k.shape), "the shape of k")
    checks.check_device(q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    checks.check_cu_seqlens(cu_seqlens, q.shape[0], exact=not padding)
    accepted = (*attention_kernels.ATTENTION_BACKENDS, "auto")
    if backend not in accepted:
        raise ValueError(f"unknown attention backend {backend!r}; accepted: {', '.join(accepted)}")
    checks.check_max_seqlen(cu_seqlens, max_seqlen)
    if cu_seqlens_k is None:
        if max_seqlen_k is not None:
            raise ValueError(f"max_seqlen_k is {max_seqlen_k} without cu_seqlens_k; accepted: both or none")
        return
    checks.check_device(q=q, cu_seqlens_k=cu_seqlens_k)
    checks.check_cu_seqlens(cu_seqlens_k, k.shape[0], "cu_seqlens_k", exact=not padding)
    checks.check_shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens.shape), "as many sequences as q has")
    if max_seqlen_k is None:
        raise ValueError("max_seqlen_k is missing beside cu_seqlens_k; accepted: both or none")
    checks.check_max_seqlen(cu_seqlens_k, max_seqlen_k, "max_seqlen_k")
