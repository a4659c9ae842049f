"""Training: ``train(config)``."""

from dcdit.train.compute import matched_steps
from dcdit.train.ema import EMA
from dcdit.train.loop import TrainResult, train

__all__ = ["EMA", "TrainResult", "matched_steps", "train"]
