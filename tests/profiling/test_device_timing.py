"""Time of the device alone: shown on a clock that plays host and device, and on a GPU where there is one."""

from statistics import median

import pytest
import torch
from support.fake_timeline import FakeTimeline

from dcdit.profiling import device_timing
from dcdit.profiling.device_timing import (
    CapturedCalls,
    NotCapturableError,
    copies_needed,
    copy_bandwidth,
    gemm_rate,
    time_graph,
    time_graphs,
    time_kernels,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def timeline(monkeypatch: pytest.MonkeyPatch) -> FakeTimeline:
    made = FakeTimeline()
    made.install(monkeypatch)
    return made


@pytest.mark.parametrize("host", [20e-6, 400e-6, 5e-3])
def test_the_time_of_the_host_is_no_time_of_the_device(host: float, timeline: FakeTimeline) -> None:
    """Three kernels of 10 us, however long the host takes to start them. A flush alone hides 90 us of it."""

    def call() -> None:
        for _ in range(3):
            timeline.spend(host / 3)
            timeline.queue(10e-6)

    assert time_kernels(call, GPU, repeats=4) == pytest.approx([30e-3] * 4)


def test_a_call_that_waits_shows_its_wait(timeline: FakeTimeline) -> None:
    def call() -> None:
        timeline.queue(10e-6)
        timeline.wait()
        timeline.spend(50e-6)
        timeline.queue(10e-6)

    assert time_kernels(call, GPU, repeats=4) == pytest.approx([70e-3 + 1e3 * timeline.latency] * 4)


def test_copy_bandwidth_is_that_of_the_memory(timeline: FakeTimeline) -> None:
    """Copies of 2 GiB in a row: the start of the first is all that a measurement adds."""
    rates = copy_bandwidth(GPU, seconds=0.2)
    assert min(rates) == pytest.approx(3000, rel=2e-3)
    # A single copy of 256 MiB with a wait after it loses two percent to its start.
    single = copy_bandwidth(GPU, size=1 << 28, chain=1, seconds=0.2)
    assert median(single) < 0.985 * 3000


def test_copy_bandwidth_on_a_cpu() -> None:
    assert min(copy_bandwidth(CPU, size=1 << 20, seconds=0.01)) > 0


def test_gemm_rate_counts_multiply_adds_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        device_timing, "time_rounds", lambda calls, *_: type("R", (), {"times": staticmethod(lambda _: [4.0])})
    )
    assert gemm_rate(CPU, torch.float32, side=100) == [pytest.approx(2 * 100**3 * 4 / 4e-3 / 1e12)]


def test_graphs_hold_all_copies_and_count_one_call() -> None:
    made: list[str] = []
    sides = {"a": [lambda n=n: made.append(f"a{n}") for n in range(3)], "b": [lambda: made.append("b")]}
    rounds = time_graphs(sides, CPU, 0.0, warmup=1, least=2)
    assert made[:4] == ["a0", "a1", "a2", "b"]
    assert made.count("a0") == made.count("a2") == made.count("b") == 3
    assert len(rounds) == 2


def test_a_call_is_a_third_of_a_graph_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(device_timing.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += 0.010

    rounds = time_graphs({"a": [call] * 3}, CPU, 0.0, least=3)
    assert rounds.times("a") == pytest.approx([10.0] * 3)


def test_device_times_are_empty_without_a_gpu() -> None:
    assert time_kernels(lambda: None, CPU) is None
    assert time_graph([lambda: None], CPU) is None


@pytest.mark.parametrize(("size", "copies"), [(1 << 30, 1), (1 << 20, 100), (64, 64)])
def test_copies_exceed_the_cache(size: int, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("P", (), {"L2_cache_size": 50 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert copies_needed(size, GPU, most=64) == min(copies, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_on_a_gpu() -> None:
    x = torch.zeros(1 << 24, device="cuda")
    assert min(time_kernels(lambda: x.add_(1), x.device)) > 0
    assert min(time_graph([lambda: x.add_(1)], x.device)) > 0
    assert time_graph([lambda: x.sum().item()], x.device) is None
    with pytest.raises(NotCapturableError, match="waits for the device"):
        CapturedCalls([lambda: x.nonzero()], x.device)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert min(copy_bandwidth(x.device, size=1 << 26, seconds=0.05)) > 0
