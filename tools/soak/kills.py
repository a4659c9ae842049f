"""Training that is killed with SIGKILL at random moments and resumed, again and again, until it is done.

Afterwards the weights, the averaged weights and the optimiser's state must be those of a run that nobody killed, bit
for bit, and the log must be the same. After every kill, the newest checkpoint must be complete, and no older than the
one before the kill.

Each attempt is a process, forked from one that has imported everything but has never computed. Its parent kills it
after a random time, which is at most as long as the run that nobody killed took. In the first setting most of it is
spent on steps. In the second the time begins when a checkpoint begins to be written, is at most an eighth of that run,
and most of it is spent on writing, replacing and deleting checkpoints.
"""

import itertools
import json
import math
import os
import random
import signal
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import numpy as np
import torch
import torch._dynamo
from tqdm import tqdm

from dcdit import checkpoint as ckpt
from dcdit.config import TrainConfig, override
from dcdit.train import train
from dcdit.utils.tables import markdown_table
from tools.soak.part import Part
from tools.soak.processes import end_with

KILLS = 100
SEED = 0
OUTPUT = "output.txt"
BASE: dict[str, Any] = {
    "model.name": "DC-DiT-S",
    "model.num_classes": 3,
    "model.overrides": {"in_channels": 3, "grid": [8, 8], "hidden_size": 128, "depth": 1, "num_heads": 2},
    "data.kind": "npz",
    "optim.batch_size": 4,
    "optim.ema_decay": 0.9,
    "optim.device": "cpu",
    "router.group_size": 2,
    "router.drop_warmup_steps": 1,
    "run.log_every": 1,
    "run.eval_every": 7,
    "run.eval_images": 2,
}


@dataclass(frozen=True)
class Setting:
    """What is killed, after how long at most, and which column counts the kills that are wanted."""

    name: str
    share: float
    """The longest time of an attempt, over that of the run that nobody killed: seconds would depend on the machine."""
    counted: str
    overrides: dict[str, Any]
    from_writing: bool = False
    """Whether that time begins when the attempt begins to write a checkpoint."""


IN_TRAINING, IN_WRITING = "kills", "while a checkpoint was written or deleted"
SETTINGS = (
    Setting("training", 1.0, IN_TRAINING, {"optim.steps": 60, "run.checkpoint_every": 5, "data.workers": 1}),
    Setting(
        "checkpoint writing",
        1 / 8,
        IN_WRITING,
        {
            "optim.steps": 12,
            "run.checkpoint_every": 1,
            "run.keep_checkpoints": 2,
            "model.overrides.hidden_size": 768,
            "model.overrides.num_heads": 12,
        },
        from_writing=True,
    ),
)
COLUMNS = (
    IN_TRAINING,
    IN_WRITING,
    "before the first checkpoint",
    "runs finished",
    "checkpoints incomplete or lost",
    "tensors that differ",
    "log lines that differ",
    "files left over",
)
FAULTS = COLUMNS[4:]


def run(kills: int = KILLS, settings: tuple[Setting, ...] = SETTINGS) -> Part:
    """Kill in each setting until ``kills`` of them count."""
    torch.set_num_threads(1)
    # By default all forked processes share the lock of the progress bars, and a killed one may hold it for ever.
    tqdm.set_lock(threading.RLock())
    rows, faults = [], 0
    with tempfile.TemporaryDirectory(prefix="dcdit-soak-") as name:
        for setting in settings:
            found = _kill(setting, Path(name) / setting.name.replace(" ", "-"), kills)
            faults += sum(found[column] for column in FAULTS)
            rows.append([setting.name, *(f"{found[column]:,}" for column in COLUMNS)])
    return Part(f"{(__doc__ or '').strip()}\n\n{markdown_table(['SIGKILL during', *COLUMNS], rows)}", faults)


def _kill(setting: Setting, folder: Path, kills: int) -> Counter[str]:
    """Run, kill and resume, and count what was found, by column."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), np.arange(12) % 3
    np.savez(folder / "images.npz", images=images, labels=labels)
    config = override({}, {**BASE, **setting.overrides, "data.path": str(folder / "images.npz")})
    whole = folder / "whole"
    began = time.monotonic()
    _ends_within(math.inf, _training(config, whole), folder)
    longest = setting.share * (time.monotonic() - began)
    found: Counter[str] = Counter()
    moments = random.Random(SEED)
    with tqdm(total=kills, desc=setting.name, unit="kill") as bar:
        while found[setting.counted] < kills:
            out = folder / f"run-{found['runs finished']}"
            newest = _newest(out)
            begun = _writes_to(out) if setting.from_writing else _at_once
            if _ends_within(moments.uniform(0, longest), _training(config, out), folder, begun):
                _compare(whole, out, found)
            else:
                found[IN_TRAINING] += 1
                found[IN_WRITING] += bool(_unfinished(out))
                found["before the first checkpoint"] += _newest(out) is None
                bar.update(found[setting.counted] - bar.n)
            found["checkpoints incomplete or lost"] += not _is_kept(newest, _newest(out), out)
    out = folder / f"run-{found['runs finished']}"
    _ends_within(math.inf, _training(config, out), folder)
    _compare(whole, out, found)
    return found


# --- processes ----------------------------------------------------------------------------------------------------


def _training(config: TrainConfig, out: Path) -> Callable[[], Any]:
    settings = override(config, {"run.out": str(out)})
    return lambda: train(settings, resume=out if ckpt.list_checkpoints(out) else None)


def _at_once() -> bool:
    return True


def _writes_to(out: Path) -> Callable[[], bool]:
    """Whether something is written to a run's folder that was not there before."""
    before = _unfinished(out)
    return lambda: bool(_unfinished(out) - before)


def _unfinished(out: Path) -> set[Path]:
    """Files of checkpoints that are being written or deleted."""
    return set((out / ckpt.CHECKPOINTS).glob(".*/*/*"))


def _ends_within(seconds: float, work: Callable[[], Any], folder: Path, begun: Callable[[], bool] = _at_once) -> bool:
    """Whether a forked process that does ``work`` ends before so many seconds; else it is killed.

    What it prints goes to a file in ``folder``. The seconds begin when ``begun`` says so.
    """
    process, deadline = _fork(work, folder), math.inf
    try:
        while not os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT | os.WNOHANG) and time.monotonic() < deadline:
            time.sleep(0.001)
            if deadline == math.inf and begun():
                deadline = time.monotonic() + seconds
    finally:  # also if this process is asked to end
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and status:
        raise RuntimeError(f"a run failed by itself: {(folder / OUTPUT).read_text().splitlines()[-1:]}")
    return os.WIFEXITED(status)


def _fork(work: Callable[[], Any], folder: Path) -> int:
    parent = os.getpid()
    process = os.fork()
    if process:
        return process
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with(parent)
        tempfile.tempdir = str(folder)  # what a killed process leaves there goes with the folder
        output = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


# --- what is found --------------------------------------------------------------------------------------------------


def _newest(run: Path) -> int | None:
    """The step of the newest checkpoint."""
    return ckpt.read_trainer(run)["step"] if ckpt.list_checkpoints(run) else None


def _is_kept(before: int | None, now: int | None, run: Path) -> bool:
    """Whether the newest checkpoint is no older than before the kill, and complete."""
    if now is None:
        return before is None
    return (before is None or now >= before) and len(ckpt.load_checkpoint(run).model) > 0


def _compare(whole: Path, run: Path, found: Counter[str]) -> None:
    """Count a finished run, and what it has that the run which nobody killed has not, or the reverse."""
    found["runs finished"] += 1
    one, two = ckpt.load_checkpoint(whole), ckpt.load_checkpoint(run)
    for part in ("model", "ema", "optimizer"):
        left, right = getattr(one, part), getattr(two, part)
        names = left.keys() | right.keys()
        same = [name in left and name in right and torch.equal(left[name], right[name]) for name in names]
        found["tensors that differ"] += same.count(False)
    logs = [_records(folder) for folder in (whole, run)]
    found["log lines that differ"] += sum(a != b for a, b in itertools.zip_longest(*logs))
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (whole, run)]
    found["files left over"] += len(files[0] ^ files[1])


def _records(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in record.items() if name != "images_per_s"} for record in records]
