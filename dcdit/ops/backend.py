"""Which implementation an operation runs on: Triton kernels, vectorised PyTorch, or the plain reference."""

import threading
from contextvars import ContextVar
from types import ModuleType, TracebackType

from torch import Tensor
from torch.compiler import is_compiling

BACKENDS = ("triton", "torch", "reference")

_blocks: ContextVar[tuple[str | None, ...]] = ContextVar("dcdit_backend_blocks", default=())
"""What the ``with`` blocks around the running code ask for, outermost first; None is the default of each device."""


class _OfThread(threading.local):
    """The same for ``torch.compile``, which can guard on an attribute of a thread but not on a context variable."""

    def __init__(self) -> None:
        self.blocks: tuple[str | None, ...] = ()


_traced = _OfThread()


class use_backend:
    """Run every operation inside the ``with`` block on one backend.

    The block holds for the code that it encloses, as a :class:`contextvars.ContextVar` does: not for other threads and
    not for other asyncio tasks. Blocks nest, and one object may be used several times. Activation checkpointing
    (``torch.utils.checkpoint``) computes again on the backend of the forward, wherever the backward runs.

    Outside of such a block, GPU tensors run on ``"triton"`` and all others on ``"torch"``.

    Args:
        name: ``"triton"``, ``"torch"`` or ``"reference"``.

    Raises:
        ValueError: unknown backend name.

    Example:
        >>> p = torch.tensor([[0.9, 0.2, 0.7]])
        >>> with ops.use_backend("reference"):
        ...     kept = ops.select_tokens(p).indices
        >>> kept.tolist(), ops.select_tokens(p).indices.tolist()
        ([0, 2], [0, 2])
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r}; accepted: {', '.join(BACKENDS)}")
        self.name: str | None = name

    def __enter__(self) -> None:
        _set_blocks((*_get_blocks(), self.name))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _set_blocks(_get_blocks()[:-1])


class keep_backend(use_backend):
    """Run every operation inside the ``with`` block on the backend that was asked for where this object was made."""

    def __init__(self) -> None:
        self.name = _asked_for()


def backend_name(tensor: Tensor) -> str:
    """The name of the backend that an operation on this tensor runs on."""
    return _asked_for() or ("triton" if tensor.is_cuda else "torch")


def backend_for(tensor: Tensor) -> ModuleType:
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


def _asked_for() -> str | None:
    blocks = _get_blocks()
    return blocks[-1] if blocks else None


def _get_blocks() -> tuple[str | None, ...]:
    return _traced.blocks if is_compiling() else _blocks.get()


def _set_blocks(blocks: tuple[str | None, ...]) -> None:
    if not is_compiling():
        _blocks.set(blocks)
    _traced.blocks = blocks
