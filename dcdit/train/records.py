"""The records of a run: metrics averaged since the last record, and the log, trackers and callbacks that get them."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcdit.config import TrainConfig
from dcdit.train.compute import SpentFlops
from dcdit.train.divergence import check_metrics
from dcdit.train.schedule import compression_target, learning_rate, width_target
from dcdit.train.trackers import Trackers
from dcdit.utils.files import write_text, writing
from dcdit.utils.reading import read_bytes

LOG_BYTES = 1 << 32
"""A log may have so many."""
LogRecord = dict[str, Any]
"""A line of log.jsonl: ``step`` and numbers by name."""


class MetricMeans:
    """Means of metrics since the last record. They stay on the device until they are read."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.values: list[dict[str, Tensor]] = []
        self.images, self.began = 0, time.monotonic()

    def add(self, values: dict[str, Tensor], images: int) -> None:
        """Add the metrics () of one step and the number of its images."""
        self.values.append(values)
        self.images += images

    def read(self, step: int, accelerator: Any) -> dict[str, float]:
        """Means over the steps and the processes, each of which has to call this.

        Args:
            step: the last of the steps.

        Raises:
            FloatingPointError: a metric is not finite.
        """
        rows = accelerator.reduce(self._rows(), reduction="mean").cpu()
        names = list(self.values[0])
        check_metrics(names, rows.tolist(), step)
        return dict(zip(names, rows.mean(0).tolist(), strict=True))

    def check(self, step: int) -> None:
        """Raise FloatingPointError if a metric of this process is not finite; ``step`` is the last of the steps."""
        if self.values:
            check_metrics(list(self.values[0]), self._rows().tolist(), step)

    def _rows(self) -> Tensor:
        """(steps, names) on the device."""
        return torch.stack([torch.stack([value.float() for value in values.values()]) for values in self.values])

    def images_per_second(self) -> float:
        return self.images / (time.monotonic() - self.began)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block does not count as training."""
        began = time.monotonic()
        yield
        self.began += time.monotonic() - began


def training_record(
    step: int, means: MetricMeans, flops: SpentFlops, config: TrainConfig, accelerator: Any
) -> LogRecord:
    """The record of the steps since the last one, the same on every process, each of which has to call this.

    Args:
        step: steps done.
        means: of these steps; cleared.
        flops: spent so far.

    Raises:
        FloatingPointError: a metric is not finite.
    """
    record: LogRecord = {"step": step, **means.read(step, accelerator)}
    record["lr"] = learning_rate(config.optim, step - 1)
    if "ratio_loss" in record and "kept" in record:
        record["target"] = compression_target(config.router, step - 1)
    if "width_loss" in record:
        record["width_target"] = width_target(config.width, step - 1)
    record |= {"flops": flops.read(accelerator), "images_per_s": means.images_per_second()}
    means.clear()
    return record


def summary(record: LogRecord) -> str:
    """A training record in a few words, for the progress bar."""
    kept = f" kept {record['kept']:.1%}" if "kept" in record else ""
    share = f" FLOPs {record['flops_share']:.1%}" if "flops_share" in record else ""
    distill = f" distill {record['distill_loss']:.3f}" if "distill_loss" in record else ""
    return f"loss {record['loss']:.4f}{kept}{share}{distill} {record['images_per_s']:.1f} images/s"


class RecordWriter:
    """Gives records to log.jsonl, to the trackers and to the callbacks, on the main process only."""

    def __init__(
        self, log: Path, trackers: Trackers, callbacks: Sequence[Callable[[LogRecord], None]], main_process: bool
    ) -> None:
        self.log, self.trackers, self.callbacks, self.main_process = log, trackers, callbacks, main_process

    def write(self, record: LogRecord) -> None:
        if not self.main_process:
            return
        append(self.log, record)
        self.trackers.write(record)
        for callback in self.callbacks:
            callback(record)


def append(log: Path, record: LogRecord) -> None:
    with writing(log), log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def is_validated(log: Path, step: int) -> bool:
    """Whether the log has the validation of a step."""
    records = map(json.loads, _text(log).split("\n")[:-1]) if log.exists() else ()
    return any(record["step"] == step and "val_loss" in record for record in records)


def newest_values(log: Path) -> LogRecord:
    """The newest value of every metric in a log; what cannot be read of it is left out."""
    values: LogRecord = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        for line in _text(log).split("\n"):
            values.update(json.loads(line))
    return values


def cut_log(log: Path, step: int) -> None:
    """Remove the records of steps that a resumed run will do again, and a line that a kill left unfinished.

    Raises:
        ValueError: a line that is no record.
    """
    if not log.exists():
        return
    *lines, rest = _text(log).split("\n")
    kept = [line for number, line in enumerate(lines, 1) if _step(line, f"{log}, line {number}") <= step]
    with contextlib.suppress(ValueError):
        # A complete record whose line end is missing, as some editors leave it.
        kept += [rest] if _step(rest, "") <= step else []
    write_text(log, "".join(f"{line}\n" for line in kept))


def _text(log: Path) -> str:
    return read_bytes(log, LOG_BYTES).decode(errors="replace")


def _step(line: str, where: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        raise ValueError(f"{where}: {line[:40]!r} is no record of a run; accepted: an object with its step") from None
