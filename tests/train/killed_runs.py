"""Start a run again and again, each time killed a little later: ``killed_runs.py CONFIG FOLDER STRIDE``.

Run i goes to FOLDER/i and is killed before file operation i * STRIDE, until one ends by itself; that one is removed.
Runs are forked from one process, which imports beforehand all that they would: file operations are then their own.
"""

import itertools
import shutil
import sys
from pathlib import Path

import accelerate  # noqa: F401
import torch._dynamo
import tqdm  # noqa: F401
from support.killing import dies_before

from dcdit.config import load_config
from dcdit.train import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    config, folder, stride = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    for i in itertools.count():
        out = folder / str(i)
        if not dies_before(i * stride, lambda out=out: train(load_config(config, [f"run.out={out}"]))):
            shutil.rmtree(out)
            break
