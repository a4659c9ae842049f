"""The wait for a processor, read from a folder of our own."""

import sys
from pathlib import Path

import pytest

from dcdit.profiling import load
from dcdit.profiling.load import ProcessorWait


@pytest.fixture
def threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write what the system says of a thread: nanoseconds that it ran and that it waited."""
    monkeypatch.setattr(load, "THREADS", tmp_path)
    now = [0]
    monkeypatch.setattr(load.time, "monotonic_ns", lambda: now[0])

    def write(elapsed: int, **waited: int) -> None:
        now[0] = elapsed
        for thread, ns in waited.items():
            (tmp_path / thread).mkdir(exist_ok=True)
            (tmp_path / thread / "schedstat").write_text(f"100 {ns} 3\n")

    return write


def test_the_thread_that_waited_longest_counts(threads) -> None:
    threads(1000, a=500, b=0)
    wait = ProcessorWait()
    threads(3000, a=600, b=800, c=9999)  # the last one began in between: how long it waited before is not known
    assert wait.share() == pytest.approx(800 / 2000)


def test_a_thread_that_ended_is_left_out(threads, tmp_path: Path) -> None:
    threads(0, a=0, b=0)
    wait = ProcessorWait()
    threads(1000, a=10)
    (tmp_path / "b" / "schedstat").unlink()
    assert wait.share() == pytest.approx(0.01)


@pytest.mark.parametrize("content", [None, "0 0 0\n", "", "not a number\n"])
def test_a_system_that_does_not_tell(content: str | None, threads, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "schedstat").write_text(content)
    assert ProcessorWait().share() is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the wait of a thread")
def test_of_this_process() -> None:
    share = ProcessorWait().share()
    assert share is None or 0 <= share <= 1
