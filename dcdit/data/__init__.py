"""Datasets: images, or latents of an autoencoder, with labels, read from disk.

A dataset has no end: there is a sample n for every n >= 0, and it depends on (seed, n) only. What a stream also depends
on, checkpoints keep.
"""

from dcdit.data.cifar10 import Cifar10
from dcdit.data.create import DatasetOptions, create_dataset
from dcdit.data.digits import Digits
from dcdit.data.folder import ImageFolder
from dcdit.data.latents import LatentDataset
from dcdit.data.loader import batches
from dcdit.data.npz import NpzDataset
from dcdit.data.photographs import Photographs
from dcdit.data.samples import Samples
from dcdit.data.stream import StreamDataset

__all__ = [
    "Cifar10",
    "DatasetOptions",
    "Digits",
    "ImageFolder",
    "LatentDataset",
    "NpzDataset",
    "Photographs",
    "Samples",
    "StreamDataset",
    "batches",
    "create_dataset",
]
