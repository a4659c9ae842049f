"""Which implementation an operation runs on: Triton kernels, vectorised PyTorch, or the plain reference."""

from types import ModuleType, TracebackType

import torch

BACKENDS = ("triton", "torch", "reference")

_forced: str | None = None
"""The backend that :class:`use_backend` asks for."""


class use_backend:
    """Run every operation inside the ``with`` block on one backend. It holds for all threads of the process.

    Outside of such a block, GPU tensors run on ``"triton"`` and all others on ``"torch"``.

    Args:
        name: ``"triton"``, ``"torch"`` or ``"reference"``.

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
    """The name of the backend that an operation on this tensor runs on."""
    return _forced or ("triton" if tensor.is_cuda else "torch")


def backend_for(tensor: torch.Tensor) -> ModuleType:
    """The backend that an operation on this tensor runs on, imported when it is first needed."""
    # The compiler can trace import statements, but not importlib.
    name = backend_name(tensor)
    if name == "triton":
        from dcdit.ops import _triton

        return _triton
    if name == "torch":
        from dcdit.ops import _torch

        return _torch
    from dcdit.ops import reference

    return reference
