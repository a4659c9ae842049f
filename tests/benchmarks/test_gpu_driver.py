"""A report loses at most the case in flight, whatever stops it, and a second call goes on where the first stopped."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import driver
from benchmarks.gpu.driver import Driver
from benchmarks.gpu.lines import BEGAN, DONE, FAILED, LEFT_OUT, Lines
from benchmarks.gpu.plan import Group

ROOT = Path(__file__).resolve().parents[2]
WORKER = str(Path(__file__).with_name("fake_gpu_worker.py"))


def group(name: str, *cases: str, share: float = 1.0, patience: float = 20.0) -> Group:
    return Group(name, name, cases, share, patience)


def call(folder: Path, groups: list[Group], monkeypatch: pytest.MonkeyPatch, seconds: float = 30.0) -> list[str]:
    """One call of a report; returns what it said."""
    monkeypatch.setattr(driver, "WORKER", (WORKER,))
    monkeypatch.setattr(driver, "GROUPS", groups)
    monkeypatch.setattr(driver, "LEAST_SECONDS", 0.3)
    monkeypatch.setattr(driver, "LOOK_EVERY", 0.02)
    said: list[str] = []
    Driver(Lines(folder, device="fake"), seconds, say=said.append).run()
    return said


def states(folder: Path) -> dict[str, str]:
    return {name: line["state"] for name, line in Lines(folder, device="fake").last().items()}


def began(folder: Path) -> list[str]:
    return [line["case"] for line in Lines(folder).read() if line["state"] == BEGAN]


def test_every_case_gets_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [group("a", "1", "crash", "2", "poison", "3"), group("b", "left", "4")]
    call(tmp_path, groups, monkeypatch)
    good = dict.fromkeys(("a: 1", "a: 2", "a: 3", "b: 4"), DONE)
    assert states(tmp_path) == {**good, "a: crash": FAILED, "a: poison": FAILED, "b: left": LEFT_OUT}
    lines = Lines(tmp_path).last()
    assert "exit code 7" in lines["a: crash"]["error"]
    assert lines["a: poison"]["error"] == "CUDA error"
    assert len(began(tmp_path)) == 7


def test_a_case_that_hangs_is_killed_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(tmp_path, [group("a", "1", "hang", "2", patience=0.8)], monkeypatch)
    assert states(tmp_path) == {"a: 1": DONE, "a: hang": FAILED, "a: 2": DONE}
    assert "killed after 1 s without a result" in Lines(tmp_path).last()["a: hang"]["error"]
    _wait_for_end([line["process"] for line in Lines(tmp_path).read() if "process" in line])


def test_what_failed_is_tried_again_after_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(tmp_path, [group("a", "1", "fails once"), group("b", "2")], monkeypatch)
    assert states(tmp_path)["a: fails once"] == FAILED  # once in a call
    before = len(began(tmp_path))
    call(tmp_path, [group("a", "1", "fails once", "new"), group("b", "2", "left", "3")], monkeypatch)
    assert began(tmp_path)[before:] == ["a: new", "b: left", "b: 3", "a: fails once"]
    assert states(tmp_path)["a: fails once"] == DONE
    before = len(began(tmp_path))
    call(tmp_path, [group("a", "1", "fails once", "new"), group("b", "2", "left", "3")], monkeypatch)
    assert began(tmp_path)[before:] == ["b: left"]  # perhaps it is no longer absent


def test_a_group_that_cannot_start_does_not_use_up_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(tmp_path, [group("broken", "1"), group("b", "2")], monkeypatch)
    assert states(tmp_path) == {"broken: start": FAILED, "b: 2": DONE}
    assert "cannot start" in Lines(tmp_path).last()["broken: start"]["error"]


def test_a_share_leaves_time_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The case that was running when the share was over counts as cut, and is not called a failure."""
    call(tmp_path, [group("a", "1", "hang", share=0.4), group("b", "2")], monkeypatch, seconds=3.0)
    assert states(tmp_path) == {"a: 1": DONE, "a: hang": BEGAN, "b: 2": DONE}


def test_another_device_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Lines(tmp_path, device="another").write("a: 1", DONE)
    call(tmp_path, [group("a", "1")], monkeypatch)
    assert states(tmp_path) == {"a: 1": DONE}
    assert len(began(tmp_path)) == 1


def test_torn_lines_are_left_out_and_do_not_swallow_the_next(tmp_path: Path) -> None:
    lines = Lines(tmp_path, device="x")
    lines.write("a: 1", DONE, ms=1.0)
    with open(lines.path, "ab") as file:
        file.write(b'{"case": "a: 2", "sta')
    lines.write("a: 3", DONE)
    assert [line["case"] for line in lines.read()] == ["a: 1", "a: 3"]
    lines.path.write_bytes(lines.path.read_bytes() + b'\xff\n[]\n{"case": 3, "state": "done"}\n')
    assert [line["case"] for line in lines.read()] == ["a: 1", "a: 3"]


def test_a_line_that_a_full_disk_cuts_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, write = Lines(tmp_path), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:9]))
    with pytest.raises(OSError, match="No space left on device"):
        lines.write("a: 1", DONE, ms=1.0)
    monkeypatch.undo()
    lines.write("a: 2", DONE)
    assert [line["case"] for line in lines.read()] == ["a: 2"]


CALL = """
import sys
from pathlib import Path
from benchmarks.gpu import driver
from benchmarks.gpu.lines import Lines
from benchmarks.gpu.plan import Group
driver.WORKER, driver.LOOK_EVERY = (sys.argv[2],), 0.02
driver.GROUPS = [Group(name, name, tuple(f"slow {n}" for n in range(8)), 1.0, 20.0) for name in "ab"]
driver.Driver(Lines(Path(sys.argv[1]), device="fake"), 30.0, say=str).run()
"""


def test_killed_at_any_moment_and_called_again(tmp_path: Path) -> None:
    """SIGKILL, again and again: every line is whole, every case is measured, and none of them twice."""
    rng, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen([sys.executable, "-c", CALL, str(tmp_path), WORKER], cwd=ROOT)
        enough = len(began(tmp_path)) + rng.randint(1, 4)
        while process.poll() is None and len(began(tmp_path)) < enough:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.06))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        _end_orphans(tmp_path)
    assert kills >= 3
    text = Lines(tmp_path).path.read_text()
    for line in text.splitlines():
        json.loads(line)
    assert set(states(tmp_path).values()) == {DONE}
    assert len(states(tmp_path)) == 16
    done = [line["case"] for line in Lines(tmp_path).read() if line["state"] == DONE]
    assert sorted(done) == sorted(set(done))


def _end_orphans(folder: Path) -> None:
    """The fake worker does not watch its parent, as the real one does. It may not have written a line yet."""
    orphans = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _names(entry, folder)]
    for process in orphans:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    _wait_for_end(orphans)


def _names(process: Path, folder: Path) -> bool:
    """Whether the command line of a process has this folder."""
    try:
        return str(folder).encode() in (process / "cmdline").read_bytes()
    except OSError:  # it has ended
        return False


def _wait_for_end(processes: list[int]) -> None:
    end = time.monotonic() + 10
    while any(_runs(process) for process in processes):
        assert time.monotonic() < end, f"still running: {processes}"
        time.sleep(0.02)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
