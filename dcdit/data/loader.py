"""Batches of a dataset, divided over processes."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dcdit.data.samples import Samples
from dcdit.data.stream import StreamDataset
from dcdit.utils.signals import SIGNALS

LOOK_FOR_PARENT = 0.5
"""Seconds after which a loading process looks again whether its parent is there."""


def batches(
    dataset: Samples, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches ``start`` to ``stop - 1``, of each the part that belongs to this process.

    Batch k holds samples k * batch_size to (k + 1) * batch_size - 1. Process r takes the r-th run of
    batch_size / world samples of it.

    Args:
        rank, world: which process this is, and of how many.
        workers: loading processes; 0 loads in this one. They leave signals to this one.

    Yields:
        x float32 (batch_size / world, C, H, W) and labels int64 (batch_size / world,).

    Raises:
        ValueError: the batch does not divide over the processes.

    Example:
        >>> import torch
        >>> from dcdit.data import Photographs, batches
        >>> dataset = Photographs(size=32)
        >>> x, y = next(batches(dataset, start=3, stop=4, batch_size=2))  # samples 6 and 7
        >>> torch.equal(x[1], dataset[7][0]), y.tolist() == [dataset[6][1], dataset[7][1]]
        (True, True)
    """
    if batch_size % world:
        raise ValueError(f"a batch of {batch_size} does not divide over {world} processes")
    local_batch = batch_size // world
    firsts = (k * batch_size + rank * local_batch for k in range(start, stop))
    order = (list(range(first, first + local_batch)) for first in firsts)
    if isinstance(dataset, StreamDataset):
        dataset.begin(local_batch, world, workers)
    loader: DataLoader[Any] = DataLoader(
        _WithPlaces(dataset) if isinstance(dataset, StreamDataset) else dataset,
        batch_sampler=order,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_parent,
    )
    for x, y, *places in started(loader):
        if isinstance(dataset, StreamDataset):
            dataset.passed(*places)
        yield x, y


class _WithPlaces(Dataset[tuple[Tensor, int, Tensor]]):
    """Samples of a stream, and where each leaves it: this process does not read them, and is asked to save that."""

    def __init__(self, stream: StreamDataset) -> None:
        self.stream = stream

    def __getitem__(self, n: int) -> tuple[Tensor, int, Tensor]:
        return *self.stream[n], self.stream.place(n)


def started(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader whose ``worker_init_fn`` is :func:`leave_signals_to_parent`."""
    with _signals_held():
        return iter(loader)


def leave_signals_to_parent(worker: int) -> None:
    """Ignore the signals that ask a job to end, unless they come from the process that this one works for.

    Schedulers send them to every process of a job, and launchers to every process of a group. What is still to be done
    then is decided by that process, which ends its loading processes itself.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    """End this process when its parent asks for that, or is gone.

    PyTorch watches the parent too, but from a moment on at which it may be gone already: then it waits for ever.
    """
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        received = signal.sigtimedwait(SIGNALS, LOOK_FOR_PARENT)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Deliver signals after the block. A process that starts inside begins with them held, so none comes too early."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
