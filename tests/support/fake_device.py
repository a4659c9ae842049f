"""A stand-in for the CUDA driver that works on CPU tensors, records its calls, and fails where it is told to.

``install(monkeypatch)`` replaces :data:`dcdit.utils.cuda.driver` and lets CPU tensors count as those of a GPU where the
package asks. A graph is a tape: a capture records every operator with its tensors, and a replay runs them again on the
same tensors, so that a Python number or a tensor of the moment stays what it was at the capture, as on a device. Like a
device, a capture runs nothing (what it wrote is undone), its results hold NaN before the first replay, and reading on
the host or copying from it fails.

:class:`Event` also measures time: ``elapsed_time`` is the number of calls between two records.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from dcdit.ops import checks
from dcdit.ops._torch import host_reads
from dcdit.utils import cuda

FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "equal", "normal_", "uniform_")
"""Operators that a capture on a device refuses: they wait for it, copy from pageable memory, or need a generator."""


class InjectedError(RuntimeError):
    """The failure that a test asked for."""


class FakeDriver(cuda.Driver):
    """Records what is asked of it in ``calls``.

    Attributes:
        calls: names of the calls in order, e.g. ``"capture_begin"``, ``"replay 0"``; ``"aten.mm"`` with ``operators``.
        fail_at: names of calls that raise :class:`InjectedError`.
        streams: the streams that are current, innermost last.
        devices: the devices that were made current, innermost last.
        open_pools: pools into which a capture still allocates.
    """

    device_type = "cpu"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail_at: set[str] = set()
        self.streams: list[Any] = [Stream(self, "default")]
        self.devices: list[torch.device] = []
        self.open_pools: list[cuda.Handle] = []
        self.graphs: list[Graph] = []
        self._pools = 0

    def call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail_at:
            raise InjectedError(name)

    def new_graph(self) -> "Graph":
        self.call("new_graph")
        return Graph(self)

    def new_pool(self) -> cuda.Handle:
        self.call("new_pool")
        self._pools += 1
        return (0, self._pools)

    def new_stream(self, device: torch.device) -> "Stream":
        self.call("new_stream")
        return Stream(self, "side")

    def current_stream(self, device: torch.device) -> "Stream":
        return self.streams[-1]

    @contextmanager
    def on_stream(self, stream: "Stream") -> Iterator[None]:
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        self.devices.append(device)
        try:
            yield
        finally:
            self.devices.pop()

    def new_event(self) -> "Event":
        return Event(self)

    def pinned(self, like: Tensor) -> Tensor:
        self.call("pinned")
        return torch.empty_like(like)

    def synchronize(self, device: torch.device) -> None:
        self.call("synchronize")

    def empty_cache(self) -> None:
        self.call("empty_cache")

    def close_pool(self, device: torch.device, pool: cuda.Handle) -> None:
        self.call("close_pool")
        if pool not in self.open_pools:
            raise RuntimeError("not currently recording to this pool")
        self.open_pools.remove(pool)

    def renew_generator(self, device: torch.device) -> None:
        self.call("renew_generator")

    @contextmanager
    def operators(self) -> Iterator[None]:
        """Record the operators of PyTorch too, in the order in which they are started."""
        with _Recorder(self.calls):
            yield


class Stream:
    def __init__(self, driver: FakeDriver, name: str) -> None:
        self._driver, self.name = driver, name

    def wait_stream(self, other: "Stream") -> None:
        self._driver.call(f"{self.name} waits for {other.name}")


class Event:
    """A mark in the order of the calls."""

    def __init__(self, driver: FakeDriver) -> None:
        self._driver, self._at = driver, -1

    def record(self, stream: Any = None) -> None:
        self._driver.call("record")
        self._at = len(self._driver.calls)

    def synchronize(self) -> None:
        self._driver.call("wait")
        assert self._at >= 0, "an event is waited for that was never recorded"

    def elapsed_time(self, end: "Event") -> float:
        return float(end._at - self._at)


class Graph:
    """A tape of operators."""

    def __init__(self, driver: FakeDriver) -> None:
        self._driver, self._tape, self._pool = driver, _Tape(), (0, 0)
        self.replays = 0
        self.state = "new"

    def capture_begin(self, pool: cuda.Handle, capture_error_mode: str = "global") -> None:
        self._driver.call("capture_begin")
        assert self._driver.streams[-1].name != "default", "a capture needs another stream than the default"
        self._pool = pool
        self._driver.open_pools.append(pool)
        self._tape.__enter__()
        torch.Tensor.tolist = self._tape.refuse  # type: ignore[method-assign]
        self.state = "capturing"

    def capture_end(self) -> None:
        """Fails, and leaves the pool open, where something broke the capture."""
        self._driver.calls.append("capture_end")
        if self.state != "capturing":
            raise RuntimeError("capture_end() called before capture_begin()")
        self.state = "failed"
        del torch.Tensor.tolist  # type: ignore[misc]
        self._tape.__exit__(None, None, None)
        self._tape.undo()
        if "capture_end" in self._driver.fail_at:
            raise InjectedError("capture_end")
        if self._tape.broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        self._driver.open_pools.remove(self._pool)
        self._driver.graphs.append(self)
        self.state = "captured"

    def replay(self) -> None:
        self._driver.call(f"replay {self._driver.graphs.index(self)}")
        assert self.state == "captured", f"a graph is replayed that is {self.state}"
        # As on a device, no mode of the moment reaches what was captured. In inference mode any tensor can be written.
        with _disable_current_modes(), torch.autocast("cpu", enabled=False), torch.inference_mode():
            self._tape.run()
        self.replays += 1

    def reset(self) -> None:
        self.state = "reset"

    @property
    def launches(self) -> int:
        """Operators on the tape that are no views."""
        return sum(not view for *_, view in self._tape.entries)


class _Tape(TorchDispatchMode):
    """Records operators and their tensors, and runs them again."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any], bool]] = []
        self.broken = False
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in FORBIDDEN:
            self.refuse(func)
        arguments = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        for tensor in _written(func, args, kwargs):
            self._keep(tensor)
        result = func(*args, **kwargs)
        outputs = tree_flatten(result)[0]
        view = _is_view(func)
        known = {_storage(x) for x in arguments}
        self._made |= {_storage(x) for x in outputs if isinstance(x, Tensor)} - known
        self.entries.append((func, args, kwargs, outputs, view))
        return result

    def refuse(self, what: Any = "Tensor.tolist") -> None:
        """Also in place of ``Tensor.tolist``, which is no operator."""
        self.broken = True
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")

    def _keep(self, tensor: Tensor) -> None:
        """Remember what a tensor from outside of the graph held before the capture wrote to it."""
        if _storage(tensor) not in self._made and _storage(tensor) not in self._before:
            whole = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
            self._before[_storage(tensor)] = (whole, whole.clone())

    @torch.no_grad()
    def undo(self) -> None:
        """A capture runs nothing: outside of the graph all is as before, and inside there is no value yet."""
        # Through .data: to autograd nothing has changed, as on a device.
        for tensor, before in self._before.values():
            tensor.data.copy_(before)
        for *_, outputs, view in self.entries:
            for tensor in outputs:
                if isinstance(tensor, Tensor) and not view and _storage(tensor) in self._made:
                    tensor.data.fill_(torch.nan if tensor.is_floating_point() else 0)

    @torch.no_grad()
    def run(self) -> None:
        for func, args, kwargs, outputs, view in self.entries:
            if view:
                continue
            for kept, new in zip(outputs, tree_flatten(func(*args, **kwargs))[0], strict=True):
                if isinstance(kept, Tensor) and _storage(kept) != _storage(new) and "empty" not in str(func):
                    kept.data.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._calls.append(f"aten.{func.overloadpacket.__name__}")
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    given = {a.name: x for a, x in zip(func._schema.arguments, args, strict=False)} | kwargs
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [x for name in written for x in tree_flatten(given.get(name))[0] if isinstance(x, Tensor)]


def install(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """Let the package take CPU tensors for those of a GPU: graphs, no checks of values, no free reads on the host."""
    fake = FakeDriver()
    monkeypatch.setattr(cuda, "driver", fake)
    monkeypatch.setattr(checks, "value_checks_enabled", lambda tensor: False)
    monkeypatch.setattr(host_reads, "reads_are_free", lambda x: False)
    return fake
