"""Count the work of every operation and of a whole forward pass on the Triton backend, on a small fixed problem.

    PYTHONPATH=.:tests python -m support.counted

writes counted_work.json again, after a change that was meant to change the work.
"""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.counting import CountedWork, count_work
from benchmarks.harness.sets import directions
from dcdit import ops
from dcdit.models import DCDiT, DCDiTConfig
from dcdit.ops import attention, checks
from dcdit.profiling.workloads import WORKLOADS, Shape, create_workload

PATH = Path(__file__).with_name("counted_work.json")
SHAPE = Shape(2, (4, 6), 32, 0.5, torch.float32, torch.device("cpu"))
DEPTH = 2
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "drop": {"drop_fraction": 0.3},
    "capacity": {"capacity": 40},
    "budget": {"budget": 9},
}
Counts = dict[str, Any]


def count_op(name: str, backward: bool) -> Counts:
    """The work of one operation."""
    workload = create_workload(name, SHAPE)
    with _as_on_a_gpu() as work:
        _ = workload.forward_backward() if backward else workload.forward()
    return _summary(work)


def count_model(mode: str, **config: Any) -> Counts:
    """The work of one forward pass of a small DC-DiT, without the attention kernel: a CPU runs another one."""
    torch.manual_seed(0)
    model = DCDiT(DCDiTConfig(grid=(4, 6), hidden_size=128, depth=DEPTH, num_heads=2, num_classes=4, **config)).eval()
    if hasattr(model.router, "out"):
        torch.nn.init.normal_(model.router.out.weight)
    x, t, y = torch.randn(2, 4, 4, 6), torch.tensor([10, 500]), torch.tensor([1, 2])
    flops = FlopCounterMode(display=False)
    # Its tracker of modules hooks every module, and a hooked module keeps its parent from a fused path.
    flops.mod_tracker = MagicMock(parents={"Global"})
    with torch.no_grad(), _as_on_a_gpu() as work, flops:
        model(x, t, y, **MODES[mode])
    return {**_summary(work), "flops": flops.get_total_flops()}


def count_all() -> dict[str, Counts]:
    """Every count that the guard compares, by the name of what was counted."""
    return {name: count() for name, count in CASES.items()}


CASES: dict[str, Callable[[], Counts]] = {
    **{
        f"{name}, {direction}": lambda name=name, direction=direction: count_op(name, direction != "forward")
        for name, operation in WORKLOADS.items()
        for direction in directions(operation)
    },
    **{f"model, {mode}": lambda mode=mode: count_model(mode) for mode in MODES},
    "model, cosine1d and EMA": lambda: count_model("exact", router="cosine1d", dechunk="ema"),
}


@contextmanager
def _as_on_a_gpu() -> Any:
    """Count on the Triton backend, without what happens to CPU tensors alone: checks of values, the CPU's attention."""
    with ExitStack() as stack:
        work = stack.enter_context(count_work())
        original = attention.sdpa_varlen

        def uncounted(*args: Any) -> torch.Tensor:
            with work.paused():
                return original(*args)

        stack.enter_context(patch.object(attention, "sdpa_varlen", uncounted))
        stack.enter_context(patch.object(checks, "value_checks_enabled", lambda tensor: False))
        stack.enter_context(ops.use_backend("triton"))
        yield work


def _summary(work: CountedWork) -> Counts:
    return {
        "launches": dict(sorted(work.launches.items())),
        "reads": work.reads,
        "operators": work.operators.total(),
        "bytes": work.bytes,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    PATH.write_text(json.dumps(count_all(), indent=1) + "\n")
    print(f"wrote {PATH}")
