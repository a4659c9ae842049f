"""Training runs of a tiny model, and what they leave."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dcdit import checkpoint as ckpt
from dcdit.train import TrainResult

TINY = {"in_channels": 3, "grid": [8, 8], "hidden_size": 128, "depth": 1, "num_heads": 2}

Record = dict[str, Any]


def records(run: TrainResult) -> list[Record]:
    return read_log(run.log)


def read_log(log: Path) -> list[Record]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def without_speed(records: list[Record]) -> list[Record]:
    return [{key: value for key, value in record.items() if key != "images_per_s"} for record in records]


def assert_same_weights(a: Path, b: Path) -> None:
    """Bit for bit: weights, averaged weights and optimiser state of two checkpoints."""
    one, two = ckpt.load_checkpoint(a), ckpt.load_checkpoint(b)
    for part in ("model", "ema", "optimizer"):
        left, right = getattr(one, part), getattr(two, part)
        assert left and left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), f"{part} {name}"


def stop_at(step: int) -> Callable[[Record], None]:
    """A callback that presses Ctrl-C when this step's record is written."""
    return lambda record: os.kill(os.getpid(), signal.SIGINT) if record["step"] == step else None
