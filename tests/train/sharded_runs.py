"""Runs whose weights two processes divide: ``sharded_runs.py CONFIG FOLDER``.

FOLDER/whole is one run, FOLDER/stopped the same with a stop half way, and FOLDER/static is of a static model.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import torch._dynamo
import tqdm  # noqa: F401
from support.ranks import fork_ranks
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from dcdit.config import load_config
from dcdit.train import EMA, train


def stop_half_way(record: dict[str, Any]) -> None:
    if record["step"] == 2 and "loss" in record:
        os.kill(os.getpid(), signal.SIGTERM)


def check_divided(optimizer: torch.optim.Optimizer, *arguments: object) -> None:
    """Every weight and every moment is a DTensor, and the two processes hold half of them each, but for odd sizes."""
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    for tensors in (optimizer.param_groups[0]["params"], moments):
        assert len(tensors) > 20 and all(isinstance(tensor, DTensor) for tensor in tensors)
        held = sum(tensor.to_local().numel() for tensor in tensors) / sum(tensor.numel() for tensor in tensors)
        assert 0.45 < held < 0.55, held


def work(rank: int) -> None:
    config, folder = sys.argv[1], Path(sys.argv[2])
    update = EMA.update

    def checked_update(self: EMA) -> None:
        update(self)
        assert all(isinstance(tensor, DTensor) for tensor in self._averages)

    EMA.update = checked_update
    register_optimizer_step_post_hook(check_divided)
    train(load_config(config, {"run.out": str(folder / "whole")}))
    stopped = load_config(config, {"run.out": str(folder / "stopped")})
    first = train(stopped, callbacks=[stop_half_way])
    assert (first.step, first.reason, first.signal) == (2, "interrupt", signal.SIGTERM)
    train(stopped, resume=stopped.run.out)
    train(load_config(config, {"run.out": str(folder / "static"), "model.name": "DiT-S/2", "optim.steps": 1}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(any(fork_ranks(2, work)))
