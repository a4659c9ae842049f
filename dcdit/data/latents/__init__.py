"""Latents on disk: the formats that training reads, and their making."""

from dcdit.data.latents.dataset import LatentDataset

__all__ = ["LatentDataset"]
