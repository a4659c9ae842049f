"""Time that a device needs, without the time of the host: behind a pause of the device, or inside a CUDA graph.

Also what a device can do at most, to hold such times against: the rates of a large copy and of a large product.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dcdit.profiling.rounds import WHOLE, Rounds
from dcdit.profiling.timing import Call, Clock, time_rounds
from dcdit.utils import cuda

FLUSH_BYTES = 1 << 28
"""More bytes than any L2 cache holds."""
PAUSE_RATE = 2.0e9
"""Cycles per second by which a pause is counted: no GPU of today runs much faster, so a pause is never shorter."""
COPY_BYTES = 1 << 31
GEMM_SIDE = 8192
WARMUP = 3


def buffer(size: int, device: torch.device) -> Tensor:
    """So many random bytes on a device."""
    return torch.empty(size, dtype=torch.uint8, device=device).random_()


def time_kernels(call: Call, device: torch.device, repeats: int = 30) -> list[float] | None:
    """Milliseconds of repeated calls by device events, with the L2 cache flushed before each; None without a GPU.

    The device pauses before the first event until the host has handed over the call and both events. So the time of
    the host is not part of it, except where the call itself waits for the device.
    """
    if device.type != "cuda":
        return None
    clock, flush = Clock(device), buffer(FLUSH_BYTES, device)
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    pause = int(PAUSE_RATE * (2 * (time.perf_counter() - start) + 20e-6))
    marks = []
    for _ in range(repeats):
        torch.cuda.synchronize()  # else the host would run ahead until the queue is full, and block inside the call
        flush.zero_()
        torch.cuda._sleep(pause)
        begin = clock.mark()
        call()
        marks.append((begin, clock.mark()))
    return [clock.milliseconds(begin, end) for begin, end in marks]


class CapturedCalls:
    """Calls in one CUDA graph, which is replayed when the object is called. On a CPU the calls are simply made.

    Give calls that work on different copies of their inputs, more bytes together than the L2 cache holds: then each
    finds its inputs in device memory, as in a model.

    Args:
        calls: functions without arguments that neither wait for the device nor read from it.
        device: where they run. For a GPU the calls are made a few times before they are captured.

    Raises:
        NotCapturableError: a call waits for the device.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self.calls, self.device = list(calls), device
        self.held: list[object] = []
        """What the captured calls returned: memory that a replay writes."""
        self._graph: cuda.Captured | None = None
        if not cuda.has_graphs(device):
            return
        check_capturable(self.calls[0], device)
        try:
            what = f"{len(self.calls)} calls to time"
            self._graph = cuda.capture(self._all, device, cuda.new_pool(device), what, WARMUP)
        except cuda.CaptureError as error:
            raise NotCapturableError(str(error).splitlines()[0]) from error
        self.held = self._graph.outputs

    def _all(self) -> list[object]:
        return [call() for call in self.calls]

    def __call__(self) -> None:
        if self._graph is None:
            self._all()
        else:
            self._graph.replay()


class NotCapturableError(RuntimeError):
    """No CUDA graph can hold a call: it waits for the device, or its capture failed."""


def check_capturable(call: Call, device: torch.device) -> None:
    """Make a call twice, and refuse it if it waits for the device: the best of captures is one that does not fail.

    Raises:
        NotCapturableError: it does.
    """
    call()  # compiles kernels, which may wait
    if device.type != "cuda":
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise NotCapturableError(f"the call waits for the device: {str(error).splitlines()[0]}") from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def time_graphs(sides: Mapping[str, Sequence[Call]], device: torch.device, seconds: float, **options: Any) -> Rounds:
    """Time calls inside CUDA graphs, in turns.

    Args:
        sides: name -> calls that do the same work on different copies of the inputs; a graph holds all of them.
        device: where they run.
        seconds: how long to go on.
        options: of :func:`~dcdit.profiling.timing.time_rounds`.

    Returns:
        One pass per round and name: the milliseconds of one call.

    Raises:
        NotCapturableError: a call waits for the device.
    """
    graphs = {name: CapturedCalls(calls, device) for name, calls in sides.items()}
    rounds = time_rounds(graphs, device, seconds, **options)
    for name, passes in rounds.passes.items():
        rounds.passes[name] = [{WHOLE: measured[WHOLE] / len(graphs[name].calls)} for measured in passes]
    return rounds


def time_graph(calls: Sequence[Call], device: torch.device, seconds: float = 0.2) -> list[float] | None:
    """Milliseconds of one call inside a CUDA graph, by round; None without a GPU, or where a call waits for the device.

    Args:
        calls: as in :class:`CapturedCalls`.
        device: where they run.
        seconds: how long to measure.
    """
    if not cuda.has_graphs(device):
        return None
    try:
        return time_graphs({"graph": calls}, device, seconds).times("graph")
    except NotCapturableError:
        return None


def copies_needed(bytes_of_one: int, device: torch.device, most: int = 64) -> int:
    """How many copies of the inputs it takes so that all of them together are twice the L2 cache; at most ``most``."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(1, min(most, math.ceil(2 * cache / max(1, bytes_of_one))))


def copy_bandwidth(device: torch.device, size: int | None = None, chain: int = 4, seconds: float = 0.5) -> list[float]:
    """GB/s of large copies in each round, each byte read once and written once. A memory-bound kernel is not faster.

    The copies run one after the other without a wait in between: the start of a single copy would count as copying.

    Args:
        device: whose memory.
        size: bytes of each copy (default: 2 GiB, and 256 MiB on a CPU).
        chain: copies in a row.
        seconds: how long to measure.
    """
    if size is None:
        size = COPY_BYTES if device.type == "cuda" else FLUSH_BYTES
    a, b = buffer(size, device), buffer(size, device)

    def copies() -> None:
        for number in range(chain):
            (b if number % 2 else a).copy_(a if number % 2 else b)

    times = time_rounds({"copy": copies}, device, seconds).times("copy")
    return [2 * size * chain / ms / 1e6 for ms in times]


def gemm_rate(device: torch.device, dtype: torch.dtype, side: int = GEMM_SIDE, seconds: float = 0.5) -> list[float]:
    """TFLOP/s of a large square matrix product in each round, on random numbers: zeros take less power."""
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    chain = 4

    def products() -> None:
        for _ in range(chain):
            torch.mm(a, b, out=out)

    times = time_rounds({"product": products}, device, seconds).times("product")
    return [2 * side**3 * chain / ms / 1e9 for ms in times]
