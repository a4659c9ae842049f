"""Latents on disk: the file formats that training reads, and the making of one of them.

``store`` says what every file format offers; ``shards``, ``moments``, ``pairs`` and ``arrays`` are one file format
each. ``encode`` makes shards from images, and ``manifest`` describes them.
"""

from dcdit.data.latents.dataset import LatentDataset

__all__ = ["LatentDataset"]
