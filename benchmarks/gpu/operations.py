"""Single operations at the width of XL, against their plain formulation under ``torch.compile`` and against the floor.

Both sides run inside CUDA graphs that hold several calls on copies of the inputs, more bytes together than the L2 cache
holds. Where no graph can hold one of the sides, both are timed by events behind a pause.
"""

import argparse
import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.figures import figure, interval, times, warnings
from benchmarks.gpu.lines import Lines
from benchmarks.gpu.setting import Setting
from benchmarks.harness.equality import TOLERANCE, check_accurate, check_equal
from benchmarks.harness.traffic import least_bytes, least_flops
from dcdit.profiling.device_timing import NotCapturableError, copies_needed, time_graphs, time_kernels
from dcdit.profiling.timing import Call
from dcdit.profiling.workloads import WORKLOADS, Shape, Workload, create_workload, run_forward, tensors_of

KEEP = 0.25
OURS, PLAIN = "dcdit", "torch.compile"
MOST_COPIES = 16
LATENT_SIDE = {True: 8, False: 32}
logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # some plain formulations break graphs, as they must


class OperationCases:
    """The cases of all operations."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        side = LATENT_SIDE[setting.rehearsal]
        self.shape = Shape(setting.op_batch, (side, side), setting.op_width, KEEP, setting.dtype, setting.device)

    def run(self, case: str) -> Mapping[str, Any]:
        name, direction = case.split(", ")
        backward = direction != "forward"
        workload = create_workload(name, self.shape)
        torch._dynamo.reset()
        moved = least_bytes(workload, workload.forward(), backward)
        copies = copies_needed(moved, self.setting.device, MOST_COPIES)
        workloads = [workload, *(workload.copy() for _ in range(copies - 1))]
        sides = {OURS: [_call(each, each.call, backward) for each in workloads], PLAIN: []}
        for each in workloads:
            compiled = torch.compile(each.plain(), backend=self.setting.compiler, dynamic=False)
            sides[PLAIN].append(_call(each, compiled, backward))
        self._check(name, workload, sides, backward)
        found: dict[str, Any] = {"bytes": moved, "flops": None if backward else least_flops(workload), "copies": copies}
        try:
            rounds = time_graphs(sides, self.setting.device, self.setting.seconds)
        except NotCapturableError as error:
            measured = {side: time_kernels(calls[0], self.setting.device) for side, calls in sides.items()}
            by_events = {side: ms and figure(ms) for side, ms in measured.items()}
            found |= {"by": "events", "why": str(error), "event_ms": by_events, "ms": {OURS: by_events[OURS]}}
            with contextlib.suppress(NotCapturableError):
                found["ms"] = times(time_graphs({OURS: sides[OURS]}, self.setting.device, self.setting.seconds / 2))
            return found
        ratio = rounds.ratio(PLAIN, OURS)
        pairs = [(PLAIN, OURS)]
        return {
            **found,
            "by": "graph",
            "ms": times(rounds),
            "ratio": interval(ratio),
            "warnings": warnings(rounds, pairs),
        }

    def _check(self, name: str, workload: Workload, sides: Mapping[str, list[Call]], backward: bool) -> None:
        """Both sides compute the same, on the first copy of the inputs."""
        tolerance = TOLERANCE[self.setting.dtype]
        compare = WORKLOADS[name].comparable
        if compare is not None:
            check_equal(name, compare(workload.call()), compare(workload.plain()()), tolerance)
            return
        exact = workload.double()
        right = _call(exact, exact.plain(), backward)()
        plain = _call(workload, workload.plain(), backward)()
        for side, calls in sides.items():
            check_accurate(f"{name}, {side}", calls[0](), plain, right, tolerance)


def _call(workload: Workload, call: Call, backward: bool) -> Call:
    """The call to time. The gradients of the outputs are made once: making them is no part of the operation."""
    if not backward:
        return lambda: run_forward(call)
    wanted = workload.differentiable
    ones = [torch.ones_like(output) for output in run_forward(call)]

    def forward_backward() -> tuple[Tensor, ...]:
        outputs = tensors_of(call())
        return (*(output.detach() for output in outputs), *torch.autograd.grad(outputs, wanted, ones))

    return forward_backward


def create(group: str, setting: Setting, lines: Lines, arguments: argparse.Namespace) -> OperationCases:
    return OperationCases(setting)
