"""Which attention kernels this machine can run: looked up on first use, never at import."""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Kernel(NamedTuple):
    module: str
    function: str
    package: str
    """What to install."""
    capabilities: tuple[int, ...]
    """Major compute capabilities of the NVIDIA GPUs it runs on."""
    rocm: bool
    max_head_dim: int
    registered_op: str | None
    """The torch.library op that lets torch.compile see through it; None: it can never be traced."""


# In order of preference. FlashAttention 3 is written for Hopper's asynchronous units and tuned there; FlashAttention 4
# is the only one written for Blackwell and still works on Hopper. FlashAttention 2 and PyTorch's own varlen op are the
# same kernels (PyTorch vendors them), the package first because its op allocates no random state per call.
KERNELS = {
    "flash3": _Kernel(
        "flash_attn_interface",
        "flash_attn_varlen_func",
        "FlashAttention 3 (module flash_attn_interface)",
        (9,),
        rocm=False,
        max_head_dim=256,
        registered_op="flash_attn_3::_flash_attn_forward",
    ),
    "flash4": _Kernel(
        "flash_attn.cute",
        "flash_attn_varlen_func",
        "FlashAttention 4 (module flash_attn.cute)",
        (9, 10),
        rocm=False,
        max_head_dim=128,
        registered_op=None,
    ),
    "flash2": _Kernel(
        "flash_attn",
        "flash_attn_varlen_func",
        "FlashAttention 2 (module flash_attn)",
        (8, 9, 10, 11, 12),
        rocm=True,
        max_head_dim=256,
        registered_op="flash_attn::_flash_attn_varlen_forward",
    ),
    "torch_varlen": _Kernel(
        "torch.nn.attention.varlen",
        "varlen_attn",
        "torch 2.10 or newer",
        (8, 9, 10, 11, 12),
        rocm=True,
        max_head_dim=256,
        registered_op="torch_attn::_varlen_attn",
    ),
}
NAMES = (*KERNELS, "sdpa")
HALF = (torch.float16, torch.bfloat16)


def attention_backends(device: torch.device | str) -> list[tuple[str, bool, str]]:
    """The attention backends in order of preference, for a report: (name, available on this device, reason).

    The reason says why a backend is unavailable, or what it is good for. Importing the packages happens here.
    """
    device = torch.device(device)
    listed = []
    for name, kernel in KERNELS.items():
        reason = _missing(name, device.type, device.index)
        listed.append((name, not reason, reason or f"{kernel.package}, float16 and bfloat16"))
    return [*listed, ("sdpa", True, "part of torch, every dtype; ragged batches run one call per sequence")]


def choose(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int, compiling: bool) -> str:
    """The backend to run: the requested one, or for "auto" the first that fits. ValueError where it cannot run."""
    if requested == "sdpa":
        return requested
    if requested == "auto":
        fitting = (name for name in KERNELS if not _misfit(name, device, dtype, head_dim, compiling))
        return next(fitting, "sdpa")
    # A kernel asked for by name is the caller's choice: the compiler may still break the graph there.
    reason = _misfit(requested, device, dtype, head_dim, compiling=False)
    if reason:
        others = [name for name in KERNELS if not _misfit(name, device, dtype, head_dim, compiling=False)]
        raise ValueError(f"attention backend {requested!r} {reason}; available: {', '.join([*others, 'sdpa', 'auto'])}")
    return requested


# Constant for the compiler: the choice depends on the machine and on static properties of the tensors only. This is
# what torch.compiler.assume_constant_result sets; calling it would import the whole compiler with `import dcdit`.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run(name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> Tensor:
    """Call one of :data:`KERNELS`; every row of q must belong to a sequence or be masked by the caller."""
    function, accepted = _LOADED[name]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if name == "torch_varlen":
        args = (q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        # torch 2.10 spells causal as a flag, later versions as a window.
        if "window_size" in accepted:
            return function(*args, window_size=(-1, 0) if causal else (-1, -1))
        return function(*args, is_causal=causal)
    options: dict[str, Any] = {
        "max_seqlen_q": max_seqlen,
        "max_seqlen_k": max_seqlen,
        "causal": causal,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    # Early releases of FlashAttention 4 take neither the lengths nor the flag; early ones of 3 and 4 return a tuple.
    options = {option: value for option, value in options.items() if option in accepted}
    out = function(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, **options)
    return out[0] if isinstance(out, tuple) else out


_LOADED: dict[str, tuple[Callable[..., Any], frozenset[str]]] = {}


def _misfit(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, compiling: bool) -> str:
    """Why this kernel cannot run on such tensors; empty if it can."""
    kernel = KERNELS[name]
    missing = _missing(name, device.type, device.index)
    if missing:
        return missing
    if dtype not in HALF:
        return f"needs float16 or bfloat16, not {dtype}"
    if head_dim > kernel.max_head_dim or head_dim % 8:
        return f"needs a head dimension that is a multiple of 8 up to {kernel.max_head_dim}, not {head_dim}"
    if compiling and not _is_registered(kernel.registered_op):
        return "cannot be traced by torch.compile"
    return ""


@cache
def _missing(name: str, device_type: str, device_index: int | None) -> str:
    """Why this kernel cannot run on the device at all; empty if it can. Leaves the function in ``_LOADED``."""
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
        function = getattr(importlib.import_module(kernel.module), kernel.function)
    except Exception as error:  # A binary built for another torch fails in many ways; it must not take the others down.
        return f"needs {kernel.package}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    _LOADED[name] = (function, frozenset(inspect.signature(function).parameters))
    return ""


def _is_registered(op: str | None) -> bool:
    if op is None:
        return False
    namespace, name = op.split("::")
    return hasattr(getattr(torch.ops, namespace), name)
