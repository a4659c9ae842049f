"""Every operation against the plain formulation, forward and backward: `pytest benchmarks/ --benchmark-only`.

Every side computes the same before it is timed. Sides: ``dcdit``; ``plain``, the published formulation in eager
PyTorch; ``compiled``, the same under torch.compile; ``mamba_ssm``, H-Net's EMA, where it is installed. DCDIT_BENCH
picks the shapes (see :mod:`benchmarks.harness.sets`).
"""

import functools
import logging
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.baselines import mamba, plain
from benchmarks.harness import sets
from benchmarks.harness.counting import count_work
from benchmarks.harness.equality import TOLERANCE, check_equal, comparable
from benchmarks.harness.traffic import least_bytes, least_flops
from dcdit.ops.backend import backend_name
from dcdit.profiling.timing import time_graph, time_kernels
from dcdit.profiling.workloads import WORKLOADS, Shape, create_workload, run_forward, run_forward_backward

logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # the plain formulation breaks graphs, as it must
SIDES = ("dcdit", "plain", "compiled", "mamba_ssm")
SECONDS = 0.02 if sets.chosen_set() == "tiny" else 0.4
LEAST_ROUNDS, MOST_ROUNDS = 3, 50
Work = Callable[[], tuple[Tensor, ...]]


class Sides(NamedTuple):
    """Every side of a case on the same inputs."""

    calls: dict[str, plain.Call]
    works: dict[str, Work]
    """What is timed: the calls, with their backward where it counts."""
    least_bytes: int
    flops: int | None


@functools.lru_cache(maxsize=1)
def sides_of(op: str, shape: Shape, direction: str) -> Sides:
    workload = create_workload(op, shape)
    calls = {"dcdit": workload.call, "plain": plain.create_call(op, workload.args)}
    torch._dynamo.reset()  # else the code that all cases share hits the limit of recompilations and runs eagerly
    calls["compiled"] = torch.compile(calls["plain"], dynamic=False)
    if op == "dechunk_ema" and mamba.why_not(shape.device) is None:
        calls["mamba_ssm"] = mamba.dechunk_ema(*workload.args)
    backward = direction == "forward+backward"
    return Sides(
        calls,
        {side: _work(call, workload.differentiable, backward) for side, call in calls.items()},
        least_bytes(op, workload, workload.forward(), backward),
        None if backward else least_flops(op, workload),
    )


def _work(call: plain.Call, differentiable: tuple[Tensor, ...], backward: bool) -> Work:
    return lambda: run_forward_backward(call, differentiable) if backward else run_forward(call)


def parameters() -> list[Any]:
    return [
        pytest.param(op, direction, case, side, id=f"{op}-{direction}-{case.label}-{side}")
        for case in sets.op_cases(sets.chosen_set())
        for op in WORKLOADS
        for direction in (sets.DIRECTIONS[:1] if op.startswith("select") else sets.DIRECTIONS)
        for side in SIDES
        if (direction in case.compiled or side != "compiled") and (op == "dechunk_ema" or side != "mamba_ssm")
    ]


@pytest.mark.parametrize(("op", "direction", "case", "side"), parameters())
def test_op(
    op: str, direction: str, case: sets.OpCase, side: str, benchmark: Any, copy_gbps: float, leave_out: Any
) -> None:
    shape = case.shape
    if side == "mamba_ssm" and (reason := mamba.why_not(shape.device)):
        leave_out(side, reason)
    sides = sides_of(op, shape, direction)
    work = sides.works[side]
    check_side(op, side, sides, shape.dtype)
    benchmark.group = f"{op} {direction} {case.label}"
    time_side(benchmark, work, shape.device)
    device_ms = time_kernels(work, shape.device)
    seconds = benchmark.stats.stats.median if device_ms is None else device_ms / 1e3
    gbps = sides.least_bytes / seconds / 1e9
    benchmark.extra_info.update(
        kind="op", op=op, direction=direction, side=side, case=case.label,
        batch=shape.batch, grid=list(shape.grid), width=shape.width, keep=shape.keep,
        ms=1e3 * seconds, device_ms=device_ms, graph_ms=time_graph(work, shape.device),
        bytes=sides.least_bytes, gbps=gbps, copy_share=gbps / copy_gbps,
        flops=sides.flops, gflops_per_s=None if sides.flops is None else sides.flops / seconds / 1e9,
        **counted(side, work, shape),
        host_us=host_microseconds(op, direction) if side == "dcdit" else None,
    )  # fmt: skip


def check_side(op: str, side: str, sides: Sides, dtype: torch.dtype) -> None:
    """Run a side once and compare; a side that computes something else fails its benchmark."""

    def results(name: str) -> tuple[Tensor, ...]:
        return comparable(sides.calls[name]()) if op.startswith("select") else sides.works[name]()

    check_equal(f"{op} on {side}", results(side), results("plain"), TOLERANCE[dtype])


def time_side(
    benchmark: Any, work: Work, device: torch.device, seconds: float = SECONDS, least: int = LEAST_ROUNDS
) -> None:
    """Rounds of single calls within a time budget; on a GPU each waits for the device."""

    def finished() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    finished()
    start = time.perf_counter()
    finished()
    once = time.perf_counter() - start
    rounds = min(MOST_ROUNDS, max(least, int(seconds / once)))
    benchmark.pedantic(finished, rounds=rounds, warmup_rounds=1)


def counted(side: str, work: Work, shape: Shape) -> dict[str, int | None]:
    """Peak memory of a call; on a GPU also its kernel launches and host reads. None is: not counted here."""
    peak = launches = reads = None
    if shape.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        peak = torch.cuda.max_memory_allocated() - before
    if side != "compiled":
        with count_work() as done:
            work()
        if shape.device.type != "cuda":
            peak = done.peak_bytes
        else:
            reads = done.reads
        if side == "dcdit" and backend_name(torch.empty(0, device=shape.device)) == "triton":
            launches = done.launches.total()
    return {"peak_bytes": peak, "launches": launches, "host_syncs": reads}


@functools.cache
def host_microseconds(op: str, direction: str, calls: int = 50) -> float:
    """What one call of dcdit costs the host: Python, checks, dispatch, on tensors too small to cost anything else."""
    workload = create_workload(op, sets.tiny_shape())
    work = _work(workload.call, workload.differentiable, direction == "forward+backward")
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        work()
        samples.append(time.perf_counter() - start)
    return 1e6 * median(samples[calls // 5 :])
