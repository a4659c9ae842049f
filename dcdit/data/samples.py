"""What every dataset shares. Sample n is a pure function of (seed, n), so a resumed run sees the same data."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "held_out")


class DamagedFile(ValueError):
    """A file of a dataset that is missing or not what it should be. The message names it."""


class DataWarning(UserWarning):
    """Something of a dataset is left out or shown differently. The message is one line."""


def skip_or_raise(error: DamagedFile, skip: bool) -> None:
    """Warn that something is left out if ``skip`` (``data.skip_damaged``), else raise the error."""
    if not skip:
        raise error
    warnings.warn(f"skipped: {error}", DataWarning, stacklevel=3)


class Samples(Dataset[tuple[Tensor, int]]):
    """A sequence of samples without an end; see :mod:`dcdit.data`.

    Example:
        >>> import torch
        >>> from dcdit.data import Samples, batches
        >>> class Numbers(Samples):
        ...     shape, class_names = (1, 1, 1), ("even", "odd")
        ...     def __getitem__(self, n):
        ...         return torch.full(self.shape, float(n)), n % 2
        >>> x, y = next(batches(Numbers(), start=2, stop=3, batch_size=4))
        >>> x.flatten().tolist(), y.tolist()
        ([8.0, 9.0, 10.0, 11.0], [0, 1, 0, 1])
    """

    shape: tuple[int, int, int]
    """(C, H, W) of every sample."""
    class_names: tuple[str, ...]
    """Name of every label."""
    notes: Mapping[str, str] = {}
    """What a checkpoint keeps of the data: ``latent_range`` undoes the scaling of latents when samples are decoded."""

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        """Sample n >= 0: float32 (C, H, W), an image in [-1, 1] or a latent, and its label."""
        raise NotImplementedError


def check_split(split: str) -> None:
    """ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; accepted: {', '.join(SPLITS)}")


def sample_rng(seed: int, n: int) -> np.random.Generator:
    """The random numbers of sample n."""
    return np.random.default_rng([seed, n])


def to_sample(pixels: np.ndarray[Any, Any]) -> Tensor:
    """uint8 (H, W, 3) to float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)).div_(127.5).sub_(1.0)


class Split:
    """Which of ``count`` stored items each sample shows.

    The training split is shuffled anew every epoch. The held-out split is walked in order, and holds the same items for
    every seed.

    Args:
        held_out: fraction of the items in the held-out split.
        source: where the items are, for error messages.

    Raises:
        ValueError: an unknown split, or one without items.
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
        """Number of the stored item that sample n shows."""
        epoch, position = divmod(n, len(self.items))
        if not self.shuffle:
            return int(self.items[position])
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch, 1]).permutation(self.items)
            self._epoch = epoch
        return int(self._order[position])


class StoredSamples(Samples):
    """Samples read from disk one by one.

    A damaged item stops the run. With ``skip_damaged`` the next item that can be read takes its place; sample n is then
    a pure function of (seed, n) and of what is damaged.
    """

    split: Split
    skip_damaged: bool
    """Skip damaged items, with a warning that names each and counts those that this process has met."""
    _damaged: frozenset[int] = frozenset()

    def load(self, item: int, n: int) -> tuple[Tensor, int]:
        """Stored item ``item`` as sample n shows it. DamagedFile if it cannot be read."""
        raise NotImplementedError

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        for position in range(n, n + len(self.split)):
            item = self.split.item(position)
            try:
                return self.load(item, n)
            except DamagedFile as error:
                if not self.skip_damaged:
                    raise
                if item not in self._damaged:
                    self._damaged |= {item}
                    skip_or_raise(DamagedFile(f"{error} ({len(self._damaged)} so far)"), skip=True)
        raise DamagedFile(f"none of the {len(self.split)} items from sample {n} on can be read")
