"""What a run says beside its times: the machine, the copy bandwidth, speed-ups, what was left out and why."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.harness import sets
from benchmarks.harness.machine import machine
from benchmarks.harness.summary import Row, summarise

LEFT_OUT: dict[str, str] = {}
"""What did not run, and why."""
ROWS: list[Row] = []
"""What was measured so far."""
COLUMNS = ["median", "iqr"]
"""Of the printed tables: the median, and the range of the middle half of the times. --benchmark-columns shows more."""
_started = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-set", choices=sets.SETS, help="sizes to time (default: DCDIT_BENCH, else by the device)")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.bench_set:
        os.environ["DCDIT_BENCH"] = config.option.bench_set  # read where the benchmarks are collected
    if config.option.benchmark_columns is None:
        config.option.benchmark_columns = COLUMNS


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


@pytest.fixture(autouse=True)
def row(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep what a benchmark measured for the tables at the end."""
    yield
    if info := getattr(request.node.funcargs.get("benchmark"), "extra_info", None):
        ROWS.append(info)


@pytest.fixture
def copy_gbps() -> float:
    """Bandwidth of a large copy, measured once in this run."""
    return machine()["copy_gbps"]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["dcdit"] = {**machine(), "left_out": LEFT_OUT}


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter: Any) -> None:
    if summary := summarise(ROWS):
        terminalreporter.write_line(f"\n{summary}\n")
    for variant, reason in LEFT_OUT.items():
        terminalreporter.write_line(f"left out: {variant} ({reason})")
