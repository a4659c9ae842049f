"""Which implementation an operation runs on: Triton kernels, vectorised PyTorch, or the plain reference."""

import importlib
import os
from types import ModuleType, TracebackType

import torch

BACKENDS = {
    "triton": "dcdit.ops._triton",
    "torch": "dcdit.ops._torch",
    "reference": "dcdit.ops.reference",
}

_forced: str | None = None


class use_backend:
    """Force one backend for every operation inside the ``with`` block (process-wide, not per thread).

    Args:
        name: ``"triton"``, ``"torch"`` or ``"reference"``. Without it, GPU tensors run on Triton and others on torch.

    Raises:
        ValueError: unknown backend name.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r}; accepted: {', '.join(BACKENDS)}")
        self.name = name

    def __enter__(self) -> None:
        global _forced
        self._outer = _forced
        _forced = self.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self._outer


def backend_name(tensor: torch.Tensor) -> str:
    """Name of the backend that would run an operation on this tensor."""
    return _forced or ("triton" if tensor.is_cuda else "torch")


_loaded: dict[str, ModuleType] = {}


def backend_for(tensor: torch.Tensor) -> ModuleType:
    """The module that implements the operations for this tensor."""
    name = backend_name(tensor)
    module = _loaded.get(name)
    if module is None:
        module = _loaded[name] = importlib.import_module(BACKENDS[name])
    return module


def value_checks_enabled(tensor: torch.Tensor) -> bool:
    """Checks that read tensor values cost a sync on a GPU: there they need ``DCDIT_CHECK=1``."""
    if torch.compiler.is_compiling():
        return False
    return not tensor.is_cuda or os.environ.get("DCDIT_CHECK") == "1"
