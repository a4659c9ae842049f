"""Runs on a stream, each once as a whole and once killed and continued: ``stream_runs.py CONFIG FOLDER``.

They go to FOLDER/<ranks>-<workers>/whole and .../killed, and are forked from one process that has imported what they
need.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import datasets  # noqa: F401
import torch._dynamo
import tqdm  # noqa: F401
from support.ranks import fork_ranks

from dcdit.config import load_config
from dcdit.train import train

RUNS = ((1, 2), (2, 0))
"""Processes, and loading processes of each."""
KILLED_AT = 5


def die(record: dict[str, Any]) -> None:
    if record["step"] == KILLED_AT and "loss" in record:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for ranks, workers in RUNS:
        folder = Path(sys.argv[2]) / f"{ranks}-{workers}"
        whole, killed = (
            load_config(sys.argv[1], {"run.out": str(folder / name), "data.workers": workers})
            for name in ("whole", "killed")
        )
        assert fork_ranks(ranks, lambda rank, config=whole: train(config) and None) == [0] * ranks
        codes = fork_ranks(ranks, lambda rank, config=killed: train(config, callbacks=[die]) and None)
        assert codes[0] == -signal.SIGKILL and 0 not in codes, codes
        assert (
            fork_ranks(ranks, lambda rank, config=killed: train(config, resume=config.run.out) and None) == [0] * ranks
        )
