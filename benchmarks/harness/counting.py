"""Work that is counted instead of timed: kernel launches, reads on the host, bytes that operators touch.

The counts are the same on every machine and in every run, so tests compare them exactly.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dcdit.kernels import launch as launching

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2")
"""Operators whose result, or its size, must be known on the host."""
READING_METHODS = ("tolist", "numpy", "cpu")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided")


class CountedWork:
    """What a block did."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        """Starts of each Triton kernel by name."""
        self.reads = 0
        """How often the host needed a number from a tensor; on a GPU each is a synchronisation."""
        self.operators: Counter[str] = Counter()
        """PyTorch operators that touch memory, by name, outside the kernels."""
        self.bytes = 0
        """Touched by operators and kernels: every tensor argument and result, once for each operator or launch."""
        self.peak_bytes = 0
        """The most that tensors made in the block held at the same time."""
        self._held = 0
        self.listening = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside the block."""
        outer, self.listening = self.listening, False
        try:
            yield
        finally:
            self.listening = outer

    def touch(self, *tensors: Any) -> None:
        self.bytes += sum(_nbytes(t) for t in tensors if isinstance(t, Tensor))

    def hold(self, storage: torch.UntypedStorage) -> None:
        self._held += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._held)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self._held -= size


@contextmanager
def count_work() -> Iterator[CountedWork]:
    """Count the work of the block: of this thread and of the backward passes that it starts."""
    work = CountedWork()

    def counted(launch: Callable[..., None]) -> Callable[..., None]:
        def start(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
            if 0 not in grid and work.listening:
                work.launches[kernel.__name__] += 1
                work.touch(*args, *meta.values())
            # The interpreter copies its arguments and reads them on the host; a kernel would not.
            with work.paused():
                launch(kernel, grid, *args, **meta)

        return start

    with ExitStack() as stack:
        stack.enter_context(patch.object(launching, "launch", counted(launching.launch)))
        stack.enter_context(_Methods(work))
        stack.enter_context(_Operators(work))
        yield work


class _Operators(TorchDispatchMode):
    def __init__(self, work: CountedWork) -> None:
        super().__init__()
        self.work = work
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.work.listening:
            self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name
        if name.startswith("prim::"):  # a question about a tensor, which touches none
            return
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.work.reads += name in READS or _reads_a_size(func, name, inputs[1:], kwargs)
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in storages and storage not in self.known:
                self.known.add(storage)
                self.work.hold(storage)
        is_view = bool(outputs) and all(_aliases(returned) for returned in func._schema.returns)
        if (inputs or outputs) and not is_view and name not in ALLOCATIONS:  # promote_types touches no tensor
            self.work.operators[name.removeprefix("aten::")] += 1
            self.work.touch(*inputs, *outputs)


class _Methods(TorchFunctionMode):
    """Reads of a CPU tensor that call no operator."""

    def __init__(self, work: CountedWork) -> None:
        super().__init__()
        self.work = work
        self.reading = {getattr(Tensor, name) for name in READING_METHODS}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.work.reads += self.work.listening and func in self.reading
        return func(*args, **(kwargs or {}))


def _reads_a_size(func: Any, name: str, indices: list[Tensor], kwargs: dict[str, Any]) -> bool:
    if name == "aten::repeat_interleave":
        return kwargs.get("output_size") is None
    return name in INDEXING and any(index.dtype in (torch.bool, torch.uint8) for index in indices)


def _aliases(returned: Any) -> bool:
    return returned.alias_info is not None and not returned.alias_info.is_write


def _nbytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
