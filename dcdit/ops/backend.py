"""Which implementation an operation runs on: Triton kernels, vectorised PyTorch, or the plain reference."""

from types import ModuleType, TracebackType

import torch

BACKENDS = ("triton", "torch", "reference")

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


def backend_for(tensor: torch.Tensor) -> ModuleType:
    """The module that implements the operations for this tensor, imported when it is first needed."""
    # Import statements rather than importlib: the compiler can trace them.
    name = backend_name(tensor)
    if name == "triton":
        from dcdit.ops import _triton

        return _triton
    if name == "torch":
        from dcdit.ops import _torch

        return _torch
    from dcdit.ops import reference

    return reference
