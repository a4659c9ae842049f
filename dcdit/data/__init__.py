"""Datasets: images and labels from disk. A dataset is endless: sample n, for any n >= 0, depends on (seed, n) only."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dcdit.config import DataSection
from dcdit.data.cifar10 import Cifar10
from dcdit.data.folder import ImageFolder
from dcdit.data.latents import LatentDataset
from dcdit.data.npz import NpzDataset
from dcdit.data.photographs import Photographs
from dcdit.data.samples import Samples

__all__ = [
    "Cifar10",
    "ImageFolder",
    "LatentDataset",
    "NpzDataset",
    "Photographs",
    "Samples",
    "batches",
    "create_dataset",
]


def create_dataset(section: DataSection, split: str = "train", seed: int = 0) -> Samples:
    """The dataset that a configuration describes.

    Raises:
        FileNotFoundError, ValueError: nothing readable at ``data.path``, or the options do not fit the data.
    """
    if section.kind == "photographs":
        return Photographs(section.size, section.downscale, split, section.held_out, section.flip, seed)
    if section.path is None:
        raise ValueError(f"data.path is null; data.kind={section.kind!r} needs one")
    if section.kind == "cifar10":
        return Cifar10(section.path, split, section.flip, seed)
    if section.kind == "latents":
        latent = (section.scale, section.skip_damaged)
        return LatentDataset(section.path, split, section.held_out, section.flip, seed, *latent)
    if section.kind == "npz":
        return NpzDataset(section.path, split, section.held_out, section.flip, seed)
    return ImageFolder(section.path, section.size, split, section.held_out, section.flip, seed, section.skip_damaged)


def batches(
    dataset: Samples, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches ``start`` to ``stop`` of the stream, this rank's share of each.

    Batch k holds samples k * batch_size to (k + 1) * batch_size - 1, in runs of batch_size / world per rank.

    Yields:
        x float32 (batch_size / world, C, H, W) and labels int64 (batch_size / world,).

    Raises:
        ValueError: the batch does not divide over the ranks.
    """
    if batch_size % world:
        raise ValueError(f"a batch of {batch_size} does not divide over {world} processes")
    share = batch_size // world
    firsts = (k * batch_size + rank * share for k in range(start, stop))
    order = (list(range(first, first + share)) for first in firsts)
    yield from DataLoader(dataset, batch_sampler=order, num_workers=workers, pin_memory=torch.cuda.is_available())
