"""What a run writes beside its times: the machine, the copy bandwidth, which variants were left out and why."""

import os
import time
from typing import Any

import pytest

from benchmarks.harness.machine import machine

LEFT_OUT: dict[str, str] = {}
"""What did not run, and why."""
_started = time.monotonic()


@pytest.fixture
def leave_out() -> Any:
    """Skip a variant; the results name it and the reason."""

    def leave(variant: str, reason: str) -> None:
        LEFT_OUT[variant] = reason
        pytest.skip(f"{variant} is left out: {reason}")

    return leave


@pytest.fixture(autouse=True)
def deadline() -> None:
    """Skip what starts after DCDIT_BENCH_SECONDS, so that the results so far are written."""
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
    for variant, reason in LEFT_OUT.items():
        terminalreporter.write_line(f"left out: {variant} ({reason})")
