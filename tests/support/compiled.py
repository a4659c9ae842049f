"""Run every operation, forward and backward, as the PTX compiled for one GPU, and compare with the float64 reference.

    PYTHONPATH=.:tests python -m support.compiled 90

Shipped launch configurations, the width of DC-DiT-S. `make ptx-test` runs all kernel tests that way.
"""

import sys

import pytest
import torch
from support.helpers import check_against_reference

from dcdit import ops
from dcdit.profiling.workloads import WORKLOADS, Shape, create_workload
from tools.ptx.launch import Launcher
from tools.ptx.memory import MachineError


def main(capability: int) -> None:
    failed = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        Launcher(capability).install(monkeypatch)
        for name in WORKLOADS:
            for dtype in (torch.float32, torch.bfloat16):
                workload = create_workload(name, Shape(2, (7, 9), 384, 0.4, dtype, torch.device("cpu")))
                try:
                    if workload.differentiable:
                        check_against_reference(workload.op, *workload.args, backend="triton")
                    else:
                        check_equal(workload.op, *workload.args)
                except (AssertionError, MachineError) as error:
                    failed.append(f"{name}, {dtype}: {error}")
    print("\n".join(failed) or f"{len(WORKLOADS)} operations")
    sys.exit(bool(failed))


def check_equal(op, *args) -> None:
    results = []
    for backend in ("triton", "reference"):
        with ops.use_backend(backend):
            results.append([x for x in op(*args) if isinstance(x, torch.Tensor)])
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)


if __name__ == "__main__":
    main(int(sys.argv[1]))
