"""Runs that are asked to end, each at another moment: ``signalled_runs.py CONFIG FOLDER``.

A run is a job of its own: a process group of its ranks and their loading processes. It goes to FOLDER/<name>, and the
exit codes of its ranks to FOLDER/<name>.json. The runs are forked from one process that has imported what they need.
"""

import json
import multiprocessing.process
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import accelerate  # noqa: F401
import torch._dynamo
import tqdm  # noqa: F401
from support.ranks import fork_ranks

from dcdit import checkpoint
from dcdit.cli import main
from dcdit.train import loop, validate

HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
"""Of a process that has just begun."""
MOMENTS = {
    "loading": (multiprocessing.process.BaseProcess, "start"),
    "stepping": (loop, "draw_step"),
    "validating": (validate, "validate"),
    "saving": (checkpoint, "save_checkpoint"),
}
"""What is called at a moment."""
RUNS = {
    # name: (moment, which of its calls, signal, ranks, whether only the last rank gets it)
    "loading": ("loading", 1, signal.SIGTERM, 1, False),
    "stepping": ("stepping", 2, signal.SIGINT, 1, False),
    "validating": ("validating", 2, signal.SIGTERM, 1, False),
    "saving": ("saving", 1, signal.SIGHUP, 1, False),
    "ranks": ("stepping", 2, signal.SIGTERM, 2, False),
    "rank": ("stepping", 2, signal.SIGTERM, 2, True),
}


def train(name: str, config: str, out: Path, rank: int) -> int:
    """One rank of a run. The signal comes twice, as from a launcher that passes on what its whole group got."""
    moment, call, number, ranks, only_one = RUNS[name]
    owner, function = MOMENTS[moment]
    original, calls = getattr(owner, function), []

    def signalled(*args, **kwargs):
        calls.append(function)
        result = original(*args, **kwargs) if moment == "loading" else None
        if len(calls) == call and rank == ranks - 1:
            send_twice(os.getpid() if only_one else -os.getpgid(0), number)
        return result if moment == "loading" else original(*args, **kwargs)

    for each, handler in HANDLERS.items():
        signal.signal(each, handler)
    with mock.patch.object(owner, function, signalled):
        return main(["train", "--config", config, "--out", str(out)])


def send_twice(target: int, number: int) -> None:
    """Send a signal from a process that is nobody's parent."""
    sender = os.fork()
    if not sender:
        signal.signal(number, signal.SIG_IGN)
        os.kill(target, number)
        os.kill(target, number)
        os._exit(0)
    os.waitpid(sender, 0)


def run_job(name: str, config: str, out: Path) -> list[int]:
    """Start the ranks of a run in a process group of their own; returns their exit codes."""
    os.setsid()
    for number in HANDLERS:
        signal.signal(number, signal.SIG_IGN)
    return fork_ranks(RUNS[name][3], lambda rank: train(name, config, out, rank))


if __name__ == "__main__":
    torch.set_num_threads(1)
    config, folder = sys.argv[1], Path(sys.argv[2])
    for name in RUNS:
        job = os.fork()
        if not job:
            codes = run_job(name, config, folder / name)
            (folder / f"{name}.json").write_text(json.dumps(codes))
            os._exit(0)
        os.waitpid(job, 0)
