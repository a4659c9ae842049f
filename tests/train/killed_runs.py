"""Start a run again and again, and kill each a little later: ``killed_runs.py CONFIG FOLDER STRIDE``.

Run i is in FOLDER/i and is killed before file operation i * STRIDE. The first run that ends by itself is removed and is
the last one. The runs are forked from one process that has imported everything they need, so that no file operation of
an import is counted.
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
        if not dies_before(i * stride, lambda out=out: train(load_config(config, {"run.out": str(out)}))):
            shutil.rmtree(out)
            break
