"""What a run writes down beside its times: the machine, the copy bandwidth, who was left out and why."""

import os
import time
from typing import Any

import pytest

from benchmarks.harness.machine import machine

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


@pytest.fixture
def copy_gbps() -> float:
    """Bandwidth of a large copy, measured once in this run."""
    return machine()["copy_gbps"]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["dcdit"] = {**machine(), "left_out": LEFT_OUT}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for side, reason in LEFT_OUT.items():
        terminalreporter.write_line(f"left out: {side} ({reason})")
