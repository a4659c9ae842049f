"""Streams, events, pinned memory and graphs of a CUDA device: everything that dcdit asks of them goes through here.

Nothing else in the package captures a graph or waits for a single number, so a test that replaces :data:`driver` runs
all of it on a CPU and sees the order of the calls.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
Handle = tuple[int, int]
"""What the allocator calls a pool."""


class Driver:
    """The functions of ``torch.cuda`` that are used, one call each."""

    device_type = "cuda"

    def new_graph(self) -> Any:
        return torch.cuda.CUDAGraph()

    def new_pool(self) -> Handle:
        return torch.cuda.graph_pool_handle()

    def new_stream(self, device: torch.device) -> Any:
        return torch.cuda.Stream(device)

    def current_stream(self, device: torch.device) -> Any:
        return torch.cuda.current_stream(device)

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def on_device(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.cuda.device(device)

    def new_event(self) -> Any:
        return torch.cuda.Event()

    def pinned(self, like: Tensor) -> Tensor:
        """Page-locked host memory, which the device can write to while the host goes on."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def close_pool(self, device: torch.device, pool: Handle) -> None:
        """End the allocation into a pool that a failed capture left open, and give its memory back."""
        # PyTorch has no public function for it: CUDAGraph.capture_end raises before it comes to this.
        index = torch.cuda.current_device() if device.index is None else device.index
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)

    def renew_generator(self, device: torch.device) -> None:
        """Take the device's default generator out of a capture that failed: until then it refuses to draw."""
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())


driver = Driver()


def has_graphs(device: torch.device) -> bool:
    """Whether graphs can be captured on a device."""
    return device.type == driver.device_type


class Pool(NamedTuple):
    """Where graphs are captured that never run at the same time: they share the memory, and libraries work in one
    workspace for each stream. A backward pass is captured on the stream of its forward pass.
    """

    handle: Handle
    stream: Any


def new_pool(device: torch.device) -> Pool:
    return Pool(driver.new_pool(), driver.new_stream(device))


class CaptureError(RuntimeError):
    """A graph could not be captured. The error that stopped it is its cause; streams and memory are as before.

    Example:
        >>> from dcdit.graphs import CaptureError
        >>> try:
        ...     raise CaptureError("the capture of a graph failed") from RuntimeError("out of memory")
        ... except CaptureError as error:
        ...     print(error, "because:", error.__cause__)
        the capture of a graph failed because: out of memory
    """


class Captured(NamedTuple):
    """A captured function."""

    graph: Any
    outputs: Any
    """What the function returned. Every replay writes these tensors anew; before the first they hold nothing."""

    def replay(self) -> None:
        self.graph.replay()


def capture(
    function: Callable[[], object],
    device: torch.device,
    pool: Pool,
    what: str,
    warmup: int = 3,
    undo: Callable[[], object] = lambda: None,
    rehearsal: Callable[[], object] | None = None,
) -> Captured:
    """Capture what a function starts on a device, without running it. Its tensors stay where they are at replay.

    Args:
        function: reads and writes tensors on the device, which must outlive the graph. It must not wait for the device,
            copy from or to the host, or draw from a generator. It is called ``warmup + 1`` times, of which the first
            ones run.
        device: of the tensors. The current device may be another one.
        pool: to share with other graphs.
        what: the function in words, for the message.
        warmup: calls before the capture. They compile kernels and fill caches.
        undo: called after each of them, to take back what it changed.
        rehearsal: called before the capture in place of the function.

    Raises:
        CaptureError: the capture failed, or there was no memory for the calls before it; ``__cause__`` says why.
    """
    logger.info("%s is captured in a CUDA graph", what)
    with driver.on_device(device):
        side, current = pool.stream, driver.current_stream(device)
        side.wait_stream(current)
        try:
            with driver.on_stream(side):
                for _ in range(warmup):
                    (rehearsal or function)()
                    undo()
        except torch.OutOfMemoryError as error:  # they need memory of their own, beside that of other graphs
            raise _failed(what, error) from error
        finally:
            current.wait_stream(side)
        driver.synchronize(device)
        driver.empty_cache()
        graph = driver.new_graph()
        with driver.on_stream(side), _own_casts():
            try:
                # Other threads may allocate meanwhile, as those that load data do.
                graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
                outputs = function()
                graph.capture_end()
            except Exception as error:
                _abandon(graph, device, pool)
                raise _failed(what, error) from error
            except BaseException:
                _abandon(graph, device, pool)
                raise
    return Captured(graph, outputs)


def _failed(what: str, error: Exception) -> CaptureError:
    return CaptureError(f"{what} cannot be captured: {type(error).__name__}: {error}")


@contextlib.contextmanager
def _own_casts() -> Iterator[None]:
    """Inside, autocast converts weights anew, and its copies are forgotten behind it.

    Copies from before end with the block of autocast, and the graph would go on to read their memory. Those of the
    graph hold nothing before it is replayed.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def _abandon(graph: Any, device: torch.device, pool: Pool) -> None:
    """End a capture that failed. ``torch.cuda.graph`` would leave its stream current and its pool open."""
    try:
        graph.capture_end()
    except RuntimeError:  # it ended the capture of the stream, but not that of the allocator
        with contextlib.suppress(RuntimeError):  # nor may there be anything to end
            driver.close_pool(device, pool.handle)
        driver.renew_generator(device)
    graph.reset()


class PendingRead:
    """Numbers on their way from the device to the host.

    Args:
        numbers: an integer tensor. On another device, and under ``torch.compile``, it is read when it is waited for.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._event = numbers, None
        if has_graphs(numbers.device) and not torch.compiler.is_compiling():
            with driver.on_device(numbers.device):
                self._numbers = driver.pinned(numbers)
                self._numbers.copy_(numbers, non_blocking=True)
                self._event = driver.new_event()
                self._event.record()

    def wait(self) -> list[int]:
        """The numbers. The host waits for what was started before the read, and for nothing that was started after."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()
