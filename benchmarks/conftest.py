"""What a run writes down beside its times: the machine, the copy bandwidth, who was left out and why."""

import functools
import os
import platform
import time
from typing import Any

import pytest
import torch

from benchmarks import sets
from dcdit.timing import copy_bandwidth

LEFT_OUT: dict[str, str] = {}
"""Peers that did not run, and why."""
_started = time.monotonic()


@pytest.fixture
def leave_out() -> Any:
    """Skip a side, by name and with its reason in the results."""

    def leave(side: str, reason: str) -> None:
        LEFT_OUT[side] = reason
        pytest.skip(f"{side} is left out: {reason}")

    return leave


@pytest.fixture(autouse=True)
def deadline() -> None:
    """Past DCDIT_BENCH_SECONDS the rest is skipped, so that what was measured gets written."""
    limit = os.environ.get("DCDIT_BENCH_SECONDS")
    if limit and time.monotonic() - _started > float(limit):
        LEFT_OUT["cases past the time limit"] = f"DCDIT_BENCH_SECONDS is {limit}"
        pytest.skip(f"past DCDIT_BENCH_SECONDS={limit}")


@functools.cache
def machine() -> dict[str, Any]:
    device = sets.device()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(sets.dtype()).removeprefix("torch."),
        "set": sets.chosen_set(),
        "copy_gbps": copy_bandwidth(device),
    }


@pytest.fixture
def copy_gbps() -> float:
    """Bandwidth of a large copy, measured once in this run."""
    return machine()["copy_gbps"]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["dcdit"] = {**machine(), "left_out": LEFT_OUT}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for side, reason in LEFT_OUT.items():
        terminalreporter.write_line(f"left out: {side} ({reason})")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
