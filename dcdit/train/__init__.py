"""Training: ``train(config)``, and the ``dcdit train`` command."""

from dcdit.train.command import add_arguments, run
from dcdit.train.compute import matched_steps
from dcdit.train.ema import EMA
from dcdit.train.loop import TrainResult, train

__all__ = ["EMA", "TrainResult", "add_arguments", "matched_steps", "run", "train"]
