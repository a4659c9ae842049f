"""A run of two processes in graphs, on the stand-in for the driver: ``graphed_runs.py CONFIG FOLDER``."""

import sys

import accelerate  # noqa: F401
import pytest
import torch._dynamo
import tqdm  # noqa: F401
from support import capturable_attention, fake_device
from support.ranks import fork_ranks

from dcdit.config import load_config
from dcdit.train import train


def work(rank: int) -> None:
    config = load_config(sys.argv[1], {"run.out": sys.argv[2]})
    with pytest.MonkeyPatch.context() as patch:
        capturable_attention.install(patch, 8 * 8)
        fake = fake_device.install(patch)
        train(config)
    assert sum(graph.replays for graph in fake.graphs) == 4 * (config.optim.steps - 2), "three graphs and the update"


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(any(fork_ranks(2, work)))
