"""What a run saves in its checkpoints, and how it continues from one."""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcdit import checkpoint as ckpt
from dcdit.checkpoint.card import TRAINING
from dcdit.checkpoint.model import check_fitting
from dcdit.config import TrainConfig, to_dict
from dcdit.data import Samples, StreamDataset
from dcdit.train.compute import SpentFlops
from dcdit.train.divergence import check_tensors, diverged
from dcdit.train.ema import EMA
from dcdit.train.facts import training_facts
from dcdit.train.records import MetricMeans
from dcdit.train.sharding import divided, gathered

logger = logging.getLogger(__name__)
STREAM = "stream"
"""Key of a checkpoint under which it keeps where a stream of samples is."""


@dataclass(frozen=True)
class TrainState:
    """All of a run that changes from step to step. What is random follows from the seed and the step."""

    model: ckpt.Model
    ema: EMA
    optimizer: torch.optim.Optimizer
    flops: SpentFlops

    def check_finite(self, step: int, means: MetricMeans, accelerator: Any) -> None:
        """Raise FloatingPointError, on every process, if the run has diverged. Every process has to call this.

        Args:
            step: steps done.
            means: of the steps since the last record.
        """

        def agreed(finite: Tensor) -> Tensor:
            return accelerator.gather(finite[None].int()).amin(0)

        if means.values:
            means.read(step, accelerator)
        moments = [torch.as_tensor(entry) for entries in self.optimizer.state.values() for entry in entries.values()]
        parts = {"weights": [*self.model.parameters()], "averaged weights": [*self.ema.state.values()]}
        check_tensors({**parts, "moments of the optimiser": moments}, step, agreed)

    @contextlib.contextmanager
    def router_errors_explained(self, step: int, means: MetricMeans) -> Iterator[None]:
        """Turn the router's error about NaN, which comes before there is a loss, into one that says what diverged.

        Args:
            step: done before the forward pass inside the block.
            means: of the steps since the last record.
        """
        try:
            yield
        except ValueError as error:
            if "NaN" not in str(error):
                raise
            means.check(step)
            check_tensors({"weights": [*self.model.parameters()]}, step)
            raise diverged("the router's probabilities are not finite", step + 1) from None

    def save(self, step: int, config: TrainConfig, data: Samples, accelerator: Any) -> Path:
        """Write the checkpoint of a step and delete old ones; returns its folder. Every process has to call this."""
        from accelerate.utils import gather_object

        folder = ckpt.checkpoint_path(config.run.out, step)
        flops = self.flops.read(accelerator)
        main_process = accelerator.is_main_process
        stream = {STREAM: data.state(gather_object)} if isinstance(data, StreamDataset) else {}
        moments = ckpt.optimizer_tensors(self.model, self.optimizer)
        parts = (self.model.state_dict(), self.ema.state, moments)
        weights, averages, moments = (gathered(part, main_process) for part in parts)
        if main_process:
            trainer = {"step": step, "flops": flops, "config": to_dict(config), **stream}
            notes = {
                **data.notes,
                "class_names": json.dumps(data.class_names),
                TRAINING: json.dumps(training_facts(config, step, flops)),
            }
            ckpt.save_checkpoint(folder, self.model, averages, moments, trainer, notes, weights)
            logger.info("saved %s", folder)
            ckpt.keep_newest(folder, config.run.keep_checkpoints)
        accelerator.wait_for_everyone()
        return folder

    def restore(self, saved: ckpt.Checkpoint, data: Samples, batch_size: int) -> int:
        """Continue from a checkpoint; returns the steps done.

        Args:
            data: is told where to go on, if it is a stream.
            batch_size: samples per step.

        Raises:
            ValueError: a checkpoint of another model, or without step and FLOPs; averages that are not of its weights.
        """
        kind = ckpt.architecture_of(self.model)
        if saved.architecture != kind:
            raise ValueError(
                f"{saved.path} holds a {saved.architecture}; accepted: a {kind}, as the configuration says"
            )
        own = self.model.state_dict()
        weights = {name: divided(tensor, own.get(name, tensor)) for name, tensor in saved.model.items()}
        moments = {key: divided(tensor, own.get(_weight_of(key), tensor)) for key, tensor in saved.optimizer.items()}
        ckpt.load_weights(self.model, weights, saved.path)
        check_fitting(saved.ema, self.ema.state, saved.path / ckpt.EMA_FILE)
        self.ema.load(saved.ema)
        ckpt.load_optimizer(self.model, self.optimizer, moments, saved.path / ckpt.OPTIMIZER_FILE)
        step, self.flops.spent = (_whole_number(saved, key) for key in ("step", "flops"))
        if isinstance(data, StreamDataset):
            data.restore(saved.trainer.get(STREAM), step * batch_size)
        return step


def _weight_of(key: str) -> str:
    """The name of the weight that an entry ``<weight>/<entry>`` of the optimiser belongs to."""
    return key.rpartition("/")[0]


def _whole_number(saved: ckpt.Checkpoint, key: str) -> int:
    value = saved.trainer.get(key)
    if type(value) is not int or value < 0:  # bool is a kind of int in Python
        raise ValueError(f"{saved.path}/{ckpt.TRAINER_FILE} has the {key} {value!r}; accepted: a whole number from 0")
    return value
