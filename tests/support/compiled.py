"""Run every operation, forward and backward, as the PTX compiled for one GPU, and compare with the float64 reference.

    PYTHONPATH=.:tests python -m support.compiled 90

Launch configurations are the shipped ones, the width is that of DC-DiT-S. `make ptx-test` runs all kernel tests as PTX.
"""

import sys

import pytest
import torch
from support.accuracy import check_workload

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
                    check_workload(workload, "triton")
                except (AssertionError, MachineError) as error:
                    failed.append(f"{name}, {dtype}: {error}")
    print("\n".join(failed) or f"{len(WORKLOADS)} operations")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(int(sys.argv[1]))
