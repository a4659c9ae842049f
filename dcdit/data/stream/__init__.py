"""Samples from shards that are read one after another, here or over a network, through Hugging Face's ``datasets``.

``shards`` finds the shards and reads their rows, ``lanes`` says which row each sample is, ``columns`` turns a row into
an image or a latent and a label, and ``dataset`` puts them together.
"""

from dcdit.data.stream.dataset import StreamDataset

__all__ = ["StreamDataset"]
