"""Two properties of a launch on a GPU that the Triton interpreter does not have.

A check of all addresses, as in compute-sanitizer's memcheck: every address that a kernel touches must be inside one of
its tensors, even if the kernel discards what it reads there. And float arguments become float32, as in a compiled
kernel.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from tools.ptx.memory import span


class _Guard:
    """Wraps the interpreter's memory operations and checks their addresses."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.starts = self.ends = np.empty(0, dtype=np.uint64)

    @contextmanager
    def allow(self, tensors: list[Tensor]) -> Iterator[None]:
        spans = sorted(span(tensor) for tensor in tensors)
        self.starts, self.ends = (np.array([span[i] for span in spans], dtype=np.uint64) for i in range(2))
        # A tensor inside another one (a slice of it) must not shorten the range of the outer one.
        self.ends = np.maximum.accumulate(self.ends)
        yield

    def check(self, addresses: np.ndarray, mask: np.ndarray, size: int, what: str) -> None:
        touched = np.broadcast_to(addresses, mask.shape)[mask.astype(bool)].astype(np.uint64)
        if touched.size == 0:
            return
        owner = np.searchsorted(self.starts, touched, side="right") - 1
        outside = (owner < 0) | (touched + np.uint64(size) > self.ends[owner])
        assert not outside.any(), f"{what} of {int(outside.sum())} addresses outside of every argument"

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.check(pointers, mask, np.dtype(dtype).itemsize, "load")
        return self.real.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self.check(pointers, mask, value.dtype.itemsize, "store")
        return self.real.store(pointers, value, mask)

    def atomic_rmw(self, operation: Any, pointers: Any, value: Any, mask: Any, order: Any) -> Any:
        self.check(pointers, mask, value.dtype.itemsize, "atomic")
        return self.real.atomic_rmw(operation, pointers, value, mask, order)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check every launch until the monkeypatch is undone. On a GPU, compute-sanitizer does (tools/gpu_suite.py)."""
    if torch.cuda.is_available():
        return
    guard = _Guard(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", guard)
    run = interpreter.GridExecutor.__call__

    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        args = tuple(float(np.float32(value)) if isinstance(value, float) else value for value in args)
        with guard.allow([value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]):
            run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", checked)
