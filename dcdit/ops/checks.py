"""Argument checks of the public operations. Every message names the value and what is accepted."""

import os
from itertools import pairwise

import torch
from torch import Tensor

from dcdit.utils.text import shape_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REALS = (*FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


def check_tensor(name: str, value: object) -> None:
    """The argument must be a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted: a tensor")


def check_float(**tensors: Tensor | None) -> None:
    """Every tensor must have one of the float dtypes."""
    for name, tensor in tensors.items():
        if tensor is not None and getattr(tensor, "dtype", None) not in FLOATS:
            check_tensor(name, tensor)
            raise TypeError(f"{name} has dtype {tensor.dtype}; accepted: float32, bfloat16, float16, float64")


def check_real(**tensors: Tensor) -> None:
    """Every tensor must have a float dtype, an integer dtype, or bool."""
    for name, tensor in tensors.items():
        if getattr(tensor, "dtype", None) not in REALS:
            check_tensor(name, tensor)
            raise TypeError(
                f"{name} has dtype {tensor.dtype}; accepted: floats, integers and bool "
                "(of complex numbers torch.view_as_real)"
            )


def check_same(**tensors: Tensor) -> None:
    """All tensors must share one dtype and one device."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype} but {first_name} has {first.dtype}; they must be equal")
    check_device(**tensors)


def check_device(**tensors: Tensor | None) -> None:
    """All given tensors must be on one device."""
    first_name, first = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first_name, first = name, tensor
        elif tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} but {first_name} is on {first.device}; use one device")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """The tensor must have exactly this shape; ``meaning`` says it in letters, e.g. "(B, D)"."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} has shape {shape_of(tensor)}; expected {expected} = {meaning}")


def check_not_empty(name: str, tensor: Tensor, dim: int, what: str) -> None:
    """One dimension of the tensor must not be 0; ``what`` names its entries, e.g. "channel"."""
    if tensor.shape[dim] == 0:
        raise ValueError(f"{name} has shape {shape_of(tensor)}; accepted: at least one {what}")


def check_groups(num_groups: int, channels: int) -> None:
    """A group norm needs groups of equal width."""
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}; accepted: a divisor of C = {channels}")


def check_grid(grid: tuple[int, int], length: int) -> None:
    """The grid (H, W) must have L positions."""
    if not isinstance(grid, tuple | list | torch.Size):
        raise TypeError(f"grid is {grid!r}; accepted: (H, W)")
    if len(grid) != 2 or min(grid) < 0 or grid[0] * grid[1] != length:
        raise ValueError(f"grid {tuple(grid)} does not multiply to L = {length}; accepted: (H, W) with H * W = L")


def check_cu_seqlens(cu_seqlens: Tensor, total: int, name: str = "cu_seqlens", exact: bool = True) -> None:
    """int32 or int64 (B+1,) that starts at 0, never descends, and ends at ``total`` (not exact: at or below it)."""
    if getattr(cu_seqlens, "dtype", None) not in (torch.int32, torch.int64):
        check_tensor(name, cu_seqlens)
        raise TypeError(f"{name} has dtype {cu_seqlens.dtype}; accepted: int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} has shape {shape_of(cu_seqlens)}; accepted: (B + 1,)")
    if not value_checks_enabled(cu_seqlens):
        return
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} starts at {values[0]}; it must start at 0")
    if any(b < a for a, b in pairwise(values)):
        raise ValueError(f"{name} descends: {values[:8]}; it must not")
    if values[-1] > total or (exact and values[-1] != total):
        raise ValueError(f"{name} ends at {values[-1]}; it must end at {'' if exact else 'or below '}{total}")


def check_int32(who: str, **sequences: Tensor) -> None:
    """What hands cu_seqlens on to the kernels of others takes int32 alone: a copy is left to the caller."""
    for name, cu_seqlens in sequences.items():
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {cu_seqlens.dtype}; {who} accepts int32: pass {name}.int()")


def check_max_seqlen(cu_seqlens: Tensor, max_seqlen: int, name: str = "max_seqlen") -> None:
    """max_seqlen must be an int, and no sequence may be longer."""
    if not isinstance(max_seqlen, int | torch.SymInt):
        raise TypeError(f"{name} is a {type(max_seqlen).__name__}; accepted: an int (a tensor would be a sync)")
    if value_checks_enabled(cu_seqlens) and cu_seqlens.shape[0] > 1:
        longest = int(cu_seqlens.diff().max())
        if max_seqlen < longest:
            raise ValueError(f"{name} is {max_seqlen} but the longest sequence has {longest} tokens")


def check_count(name: str, value: int) -> None:
    """A number of tokens must be an int, and no bool."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; accepted: an int")


def check_no_nan(p: Tensor) -> None:
    """Probabilities must not be NaN."""
    if value_checks_enabled(p) and bool(p.isnan().any()):
        raise ValueError(f"p holds {int(p.isnan().sum())} NaN; accepted: probabilities in [0, 1]")


def value_checks_enabled(tensor: Tensor) -> bool:
    """Whether to check the values of a tensor. On a GPU that costs a sync, so there it needs ``DCDIT_CHECK=1``."""
    if torch.compiler.is_compiling():
        return False
    return not tensor.is_cuda or os.environ.get("DCDIT_CHECK") == "1"
