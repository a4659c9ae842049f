"""What every dataset shares: sample n of a run is a pure function of (seed, n), so a resumed run sees the same data."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "held_out")


class Samples(Dataset[tuple[Tensor, int]]):
    """An endless stream of samples; see :mod:`dcdit.data`."""

    shape: tuple[int, int, int]
    """(C, H, W) of every sample."""
    class_names: tuple[str, ...]
    """Name of every label."""

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        """Sample n >= 0: float32 (C, H, W) in [-1, 1] (latents as stored), and its label."""
        raise NotImplementedError


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; accepted: {', '.join(SPLITS)}")


def sample_rng(seed: int, n: int) -> np.random.Generator:
    """The random numbers of sample n."""
    return np.random.default_rng([seed, n])


def to_sample(pixels: np.ndarray[Any, Any]) -> Tensor:
    """uint8 (H, W, 3) to float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)).div_(127.5).sub_(1.0)


class Split:
    """Which of ``count`` stored items sample n shows: a fresh shuffle per epoch, over the items of one split.

    The items held out are the same for every seed. The held-out split is walked in order, without a shuffle.
    """

    def __init__(self, split: str, count: int, held_out: float, seed: int, source: str | Path) -> None:
        check_split(split)
        order = np.random.default_rng(0).permutation(count)
        cut = round(count * held_out)
        self.items = np.sort(order[:cut] if split == "held_out" else order[cut:])
        if not len(self.items):
            raise ValueError(f"{source} has {count} items, none of them in split {split!r} with held_out={held_out}")
        self.shuffle = split == "train"
        self.seed = seed
        self._epoch = -1

    def __len__(self) -> int:
        return len(self.items)

    def item(self, n: int) -> int:
        epoch, position = divmod(n, len(self.items))
        if not self.shuffle:
            return int(self.items[position])
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch, 1]).permutation(self.items)
            self._epoch = epoch
        return int(self._order[position])
