"""The records of a run: what is averaged between two of them, and the file they go into."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcdit.utils.files import atomically

Record = dict[str, Any]


class Window:
    """Sums of metrics since the last record. They stay on the device until the record is written."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.values: list[dict[str, Tensor]] = []
        self.images, self.began = 0, time.monotonic()

    def add(self, values: dict[str, Tensor], images: int) -> None:
        self.values.append(values)
        self.images += images

    def means(self) -> tuple[list[str], Tensor]:
        names = list(self.values[0])
        rows = torch.stack([torch.stack([values[name].float() for name in names]) for values in self.values])
        return names, rows.mean(0)

    def rate(self) -> float:
        return self.images / (time.monotonic() - self.began)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block does not count as training."""
        began = time.monotonic()
        yield
        self.began += time.monotonic() - began


def cut_log(log: Path, step: int) -> None:
    """Drop records of steps that a resumed run will do again, and a line that a kill left unfinished."""
    if not log.exists():
        return
    *lines, _ = log.read_text(encoding="utf-8").split("\n")
    kept = "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step)
    atomically(log, lambda file: file.write_text(kept, encoding="utf-8"))


def append(log: Path, record: Record) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
