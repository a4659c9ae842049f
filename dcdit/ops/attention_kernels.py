"""The attention kernels of other packages, and which of them this machine can run.

Packages are imported when a kernel is first looked up, never when this module is imported.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcdit.ops.sizes import known_true


class AttentionKernel(NamedTuple):
    """A varlen attention function and what it needs."""

    module: str
    function: str
    package: str
    """What to install."""
    capabilities: tuple[int, ...]
    """Major compute capabilities of the NVIDIA GPUs it runs on."""
    rocm: bool
    """Whether it runs on AMD GPUs."""
    max_head_dim: int
    registered_op: str | None
    """The torch.library op that torch.compile can trace. None: the function cannot be traced."""
    packed_function: str | None = None
    """The same for q, k and v in one buffer (T, 3, heads, d_h), whose backward writes one buffer too. Without it,
    PyTorch copies three gradients into one."""


# In order of preference. FlashAttention 3 is written and tuned for Hopper. FlashAttention 4 is the only one written for
# Blackwell, and also runs on Hopper. FlashAttention 2 and PyTorch's own varlen op are the same kernels, which PyTorch
# copied. The package comes first because its op allocates no random state per call.
KERNELS = {
    "flash3": AttentionKernel(
        "flash_attn_interface",
        "flash_attn_varlen_func",
        "FlashAttention 3 (module flash_attn_interface)",
        (9,),
        rocm=False,
        max_head_dim=256,
        registered_op="flash_attn_3::_flash_attn_forward",
    ),
    "flash4": AttentionKernel(
        "flash_attn.cute",
        "flash_attn_varlen_func",
        "FlashAttention 4 (module flash_attn.cute)",
        (9, 10),
        rocm=False,
        max_head_dim=128,
        registered_op=None,
    ),
    "flash2": AttentionKernel(
        "flash_attn",
        "flash_attn_varlen_func",
        "FlashAttention 2 (module flash_attn)",
        (8, 9, 10, 11, 12),
        rocm=True,
        max_head_dim=256,
        registered_op="flash_attn::_flash_attn_varlen_forward",
        packed_function="flash_attn_varlen_qkvpacked_func",
    ),
    "torch_varlen": AttentionKernel(
        "torch.nn.attention.varlen",
        "varlen_attn",
        "torch 2.10 or newer",
        (8, 9, 10, 11, 12),
        rocm=True,
        max_head_dim=256,
        registered_op="torch_attn::_varlen_attn",
    ),
}
ATTENTION_BACKENDS = (*KERNELS, "sdpa")
PART_OF_SDPA = ("flash2", "torch_varlen")
"""Kernels that ``scaled_dot_product_attention`` has too, for sequences of one length."""
HALF = (torch.float16, torch.bfloat16)


def attention_backends(device: torch.device | str) -> list[tuple[str, bool, str]]:
    """The attention backends in order of preference, for a report: (name, available on this device, reason).

    The reason says why a backend is unavailable, or what it is good for. The call imports the packages.
    """
    device = torch.device(device)
    listed = []
    for name, kernel in KERNELS.items():
        reason = _why_unavailable(name, device.type, device.index)
        listed.append((name, not reason, reason or f"{kernel.package}, float16 and bfloat16"))
    return [*listed, ("sdpa", True, "part of torch, every dtype; ragged batches run one call per sequence")]


def choose_attention_backend(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int, compiling: bool
) -> str:
    """The backend to run: the requested one, or for "auto" the first that supports such tensors.

    Raises:
        ValueError: the requested backend cannot run.
    """
    if requested == "sdpa":
        return requested
    if requested == "auto":
        return _first_supported(device, dtype, head_dim, compiling)
    # A kernel that is asked for by name also runs under torch.compile, even if it breaks the graph.
    reason = _why_unsupported(requested, device, dtype, head_dim, compiling=False)
    if reason:
        others = [name for name in KERNELS if not _why_unsupported(name, device, dtype, head_dim, compiling=False)]
        raise ValueError(f"attention backend {requested!r} {reason}; available: {', '.join([*others, 'sdpa', 'auto'])}")
    return requested


# The choice depends only on the machine and on static properties of the tensors, so it is a constant for the compiler.
# torch.compiler.assume_constant_result would set the same attribute, but calling it imports the whole compiler.
choose_attention_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run_kernel(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_k: Tensor,
    max_seqlen_k: int,
    causal: bool,
) -> Tensor:
    """Call one of :data:`KERNELS` after it was chosen. What it returns in padding rows is undefined."""
    function, accepted = _LOADED[name]
    q, k, v = (x if known_true(x.stride(-1) == 1) else x.contiguous() for x in (q, k, v))
    if name == "torch_varlen":
        grouped = {}
        if q.shape[1] != k.shape[1]:
            # Early versions do not share heads.
            grouped = {"enable_gqa": True} if "enable_gqa" in accepted else {}
            k, v = (k, v) if grouped else (repeat_heads(x, q.shape[1]) for x in (k, v))
        args = (q, k, v, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        # torch 2.10 takes causal as a flag, later versions as a window.
        if "window_size" in accepted:
            return function(*args, window_size=(-1, 0) if causal else (-1, -1), **grouped)
        return function(*args, is_causal=causal, **grouped)
    options = {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen_k, **_options(causal)}
    # Early releases of FlashAttention 4 lack some of these options. Early releases of 3 and 4 return a tuple.
    options = {option: value for option, value in options.items() if option in accepted}
    out = function(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens_k, **options)
    return out[0] if isinstance(out, tuple) else out


def run_packed_kernel(name: str, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The same for q, k and v in one buffer (T, 3, heads, d_h), so that their gradients are written into one buffer."""
    if name not in _LOADED_PACKED:
        q, k, v = qkv.unbind(1)
        return run_kernel(name, q, k, v, cu_seqlens, max_seqlen, cu_seqlens, max_seqlen, causal=False)
    return _LOADED_PACKED[name](qkv, cu_seqlens, max_seqlen, **_options(causal=False))


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(T, heads_k, d_h) -> (T, heads, d_h): each head as often as heads of q read it."""
    tokens, heads_k, width = x.shape
    return x[:, :, None].expand(tokens, heads_k, heads // heads_k, width).reshape(tokens, heads, width)


def _options(causal: bool) -> dict[str, Any]:
    return {"causal": causal, "deterministic": torch.are_deterministic_algorithms_enabled()}


_LOADED: dict[str, tuple[Callable[..., Any], frozenset[str]]] = {}
"""Of each available kernel, the function and the names of its parameters."""
_LOADED_PACKED: dict[str, Callable[..., Any]] = {}
"""The packed function of each available kernel that has one."""


@cache
def _first_supported(device: torch.device, dtype: torch.dtype, head_dim: int, compiling: bool) -> str:
    supported = (name for name in KERNELS if not _why_unsupported(name, device, dtype, head_dim, compiling))
    return next(supported, "sdpa")


def _why_unsupported(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, compiling: bool) -> str:
    """Why this kernel cannot run on such tensors; empty if it can."""
    kernel = KERNELS[name]
    unavailable = _why_unavailable(name, device.type, device.index)
    if unavailable:
        return unavailable
    if dtype not in HALF:
        return f"needs float16 or bfloat16, not {dtype}"
    if head_dim > kernel.max_head_dim or head_dim % 8:
        return f"needs a head dimension that is a multiple of 8 up to {kernel.max_head_dim}, not {head_dim}"
    if compiling and not _is_registered(kernel.registered_op):
        return "cannot be traced by torch.compile"
    return ""


@cache
def _why_unavailable(name: str, device_type: str, device_index: int | None) -> str:
    """Why this kernel cannot run on this device at all; empty if it can. Then the function is in ``_LOADED``."""
    kernel = KERNELS[name]
    if device_type != "cuda":
        return f"needs a GPU, not {device_type}"
    if not torch.cuda.is_available():
        return "needs a GPU, and torch sees none"
    if torch.version.hip is not None:
        if not kernel.rocm:
            return "needs an NVIDIA GPU"
    else:
        major, minor = torch.cuda.get_device_capability(device_index)
        if major not in kernel.capabilities:
            accepted = ", ".join(f"{capability}.x" for capability in kernel.capabilities)
            return f"needs compute capability {accepted}, not {major}.{minor}"
    try:
        module = importlib.import_module(kernel.module)
        function = getattr(module, kernel.function)
        packed = getattr(module, kernel.packed_function, None) if kernel.packed_function else None
    except Exception as error:  # A binary built for another torch fails in many ways; the other kernels must still run.
        return f"needs {kernel.package}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    _LOADED[name] = (function, frozenset(inspect.signature(function).parameters))
    if packed is not None:
        _LOADED_PACKED[name] = packed
    return ""


def _is_registered(op: str | None) -> bool:
    if op is None:
        return False
    namespace, name = op.split("::")
    return hasattr(getattr(torch.ops, namespace), name)
