"""Every operation against the plain formulation, forward and backward: `pytest benchmarks/ --benchmark-only`.

Every variant must compute the same before it is timed. Variants: ``dcdit``; ``plain``, the published formulation in
eager PyTorch; ``compiled``, the same under torch.compile; ``mamba_ssm`` and ``apex``, H-Net's moving average and group
norm with SiLU, where they are installed. DCDIT_BENCH picks the sizes (see :mod:`benchmarks.harness.sets`).
"""

import functools
import logging
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import apex, mamba
from benchmarks.harness import sets
from benchmarks.harness.counting import count_work
from benchmarks.harness.equality import TOLERANCE, check_accurate, check_equal
from benchmarks.harness.traffic import least_bytes, least_flops
from dcdit.ops.backend import backend_name
from dcdit.profiling.device_timing import time_graph, time_kernels
from dcdit.profiling.rounds import spread
from dcdit.profiling.workloads import WORKLOADS, Call, Shape, create_workload, run_forward, run_forward_backward

logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # the plain formulation breaks graphs, as it must
SIZES = {size.label: size for size in sets.op_sizes(sets.chosen_set())}
OTHERS = {"mamba_ssm": (mamba, "dechunk_ema"), "apex": (apex, "group_norm_silu")}
"""Other implementations, and the one operation that they have, too."""
VARIANTS = ("dcdit", "plain", "compiled", *OTHERS)
SECONDS = 0.02 if sets.chosen_set() == "tiny" else 0.4
LEAST_ROUNDS, MOST_ROUNDS = 3, 50
TimedCall = Callable[[], tuple[Tensor, ...]]


class Comparison(NamedTuple):
    """Every variant of an operation on the same inputs."""

    calls: dict[str, Call]
    timed: dict[str, TimedCall]
    """The calls, with their backward where it counts."""
    expected: tuple[Tensor, ...]
    """What the plain formulation computes."""
    exact: tuple[Tensor, ...] | None
    """The same in float64, where the inputs are of 16 bits. None where two variants can be compared directly."""
    least_bytes: int
    flops: int | None


@functools.lru_cache(maxsize=1)
def comparison_of(op: str, shape: Shape, direction: str) -> Comparison:
    workload = create_workload(op, shape)
    calls: dict[str, Call] = {"dcdit": workload.call, "plain": workload.plain()}
    torch._dynamo.reset()  # else the code that all sizes share hits the limit of recompilations and runs eagerly
    calls["compiled"] = torch.compile(calls["plain"], dynamic=False)
    for variant, (baseline, its_op) in OTHERS.items():
        if op == its_op and baseline.reason_unavailable(shape.device) is None:
            calls[variant] = baseline.create_call(**workload.arguments)
    backward = direction == "forward+backward"
    timed = {variant: _timed(call, workload.differentiable, backward) for variant, call in calls.items()}
    exact = None
    if shape.dtype.itemsize == 2 and WORKLOADS[op].comparable is None:
        double = workload.double()
        exact = _timed(double.plain(), double.differentiable, backward)()
    return Comparison(
        calls,
        timed,
        _comparable(op, "plain", calls, timed),
        exact,
        least_bytes(workload, workload.forward(), backward),
        None if backward else least_flops(workload),
    )


def _timed(call: Call, differentiable: tuple[Tensor, ...], backward: bool) -> TimedCall:
    return lambda: run_forward_backward(call, differentiable) if backward else run_forward(call)


def parameters() -> list[Any]:
    return [
        pytest.param(op, direction, label, variant, id=sets.case_id(op, direction, label, variant))
        for label, size in SIZES.items()
        for op, operation in WORKLOADS.items()
        for direction in sets.directions(operation)
        for variant in VARIANTS
        if (direction in size.compiled or variant != "compiled") and (variant not in OTHERS or op == OTHERS[variant][1])
    ]


@pytest.mark.parametrize(("op", "direction", "size", "variant"), parameters())
def test_op(op: str, direction: str, size: str, variant: str, benchmark: Any, copy_gbps: float, leave_out: Any) -> None:
    shape = SIZES[size].shape
    if variant in OTHERS and (reason := OTHERS[variant][0].reason_unavailable(shape.device)):
        leave_out(variant, reason)
    comparison = comparison_of(op, shape, direction)
    call = comparison.timed[variant]
    check_variant(op, variant, comparison, shape.dtype)
    benchmark.group = f"{op} {direction} {size}"
    time_variant(benchmark, call, shape.device)
    by_host = [1e3 * seconds for seconds in benchmark.stats.stats.data]
    by_device, in_graph = time_kernels(call, shape.device), time_graph([call], shape.device)
    times = by_host if by_device is None else by_device
    seconds = median(times) / 1e3
    gbps = comparison.least_bytes / seconds / 1e9
    benchmark.extra_info.update(
        kind="op", op=op, direction=direction, variant=variant, label=size,
        batch=shape.batch, grid=list(shape.grid), width=shape.width, keep=shape.keep,
        ms=1e3 * seconds, spread=spread(times), by="host" if by_device is None else "device",
        graph_ms=in_graph and median(in_graph), graph_spread=in_graph and spread(in_graph),
        bytes=comparison.least_bytes, gbps=gbps, copy_share=gbps / copy_gbps,
        flops=comparison.flops, gflops_per_s=None if comparison.flops is None else comparison.flops / seconds / 1e9,
        **counted(variant, call, shape),
        host_us=host_microseconds(op, direction) if variant == "dcdit" else None,
    )  # fmt: skip


def check_variant(op: str, variant: str, comparison: Comparison, dtype: torch.dtype) -> None:
    """Run a variant once and compare; a variant that computes something else fails its benchmark.

    Inputs of 16 bits are compared with the plain formulation in float64: in 16 bits it is itself off by more than two
    orders of summation may differ, where a gradient sums over many rows.
    """
    results = _comparable(op, variant, comparison.calls, comparison.timed)
    what, tolerance = f"{op} on {variant}", TOLERANCE[dtype]
    if comparison.exact is None:
        check_equal(what, results, comparison.expected, tolerance)
    else:
        check_accurate(what, results, comparison.expected, comparison.exact, tolerance)


def _comparable(op: str, variant: str, calls: Mapping[str, Call], timed: Mapping[str, TimedCall]) -> tuple[Tensor, ...]:
    """The results of a variant that can be compared with those of another one."""
    compare = WORKLOADS[op].comparable
    return timed[variant]() if compare is None else compare(calls[variant]())


def time_variant(
    benchmark: Any, call: TimedCall, device: torch.device, seconds: float = SECONDS, least: int = LEAST_ROUNDS
) -> None:
    """Rounds of single calls within a time budget, after two calls that do not count; on a GPU each waits for it."""

    def finished() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    finished()
    start = time.perf_counter()
    finished()
    once = time.perf_counter() - start
    rounds = min(MOST_ROUNDS, max(least, int(seconds / once)))
    benchmark.pedantic(finished, rounds=rounds)


def counted(variant: str, call: TimedCall, shape: Shape) -> dict[str, int | None]:
    """Peak memory of a call; on a GPU also its kernel launches and host reads. None means not counted."""
    peak = launches = reads = None
    if shape.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        peak = torch.cuda.max_memory_allocated() - before
    if variant != "compiled":
        with count_work() as work:
            call()
        if shape.device.type != "cuda":
            peak = work.peak_bytes
        else:
            reads = work.reads
        if variant == "dcdit" and backend_name(torch.empty(0, device=shape.device)) == "triton":
            launches = work.launches.total()
    return {"peak_bytes": peak, "launches": launches, "host_syncs": reads}


@functools.cache
def host_microseconds(op: str, direction: str, calls: int = 50) -> float:
    """What one call of dcdit costs the host: Python, checks and dispatch, on tensors too small to cost anything."""
    workload = create_workload(op, sets.tiny_shape())
    call = _timed(workload.call, workload.differentiable, direction == "forward+backward")
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return 1e6 * median(samples[calls // 5 :])
