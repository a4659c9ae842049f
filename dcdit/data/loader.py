"""Batches of a dataset, divided over processes."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dcdit.data.samples import Samples


def batches(
    dataset: Samples, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches ``start`` to ``stop - 1``, of each the part that belongs to this process.

    Batch k holds samples k * batch_size to (k + 1) * batch_size - 1. Process r takes the r-th run of
    batch_size / world samples of it.

    Args:
        rank, world: which process this is, and of how many.
        workers: loading processes; 0 loads in this one.

    Yields:
        x float32 (batch_size / world, C, H, W) and labels int64 (batch_size / world,).

    Raises:
        ValueError: the batch does not divide over the processes.
    """
    if batch_size % world:
        raise ValueError(f"a batch of {batch_size} does not divide over {world} processes")
    local_batch = batch_size // world
    firsts = (k * batch_size + rank * local_batch for k in range(start, stop))
    order = (list(range(first, first + local_batch)) for first in firsts)
    yield from DataLoader(dataset, batch_sampler=order, num_workers=workers, pin_memory=torch.cuda.is_available())
