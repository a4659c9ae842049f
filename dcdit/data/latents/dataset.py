"""Latents that an autoencoder made, in the file formats that people have; :func:`open_latents` recognises them."""

import json
from pathlib import Path

from torch import Tensor

from dcdit.data.decode import SUFFIXES
from dcdit.data.latents.arrays import ArrayStore, holds_arrays
from dcdit.data.latents.moments import MomentStore, find_moments
from dcdit.data.latents.pairs import PairStore, find_pairs
from dcdit.data.latents.shards import ShardStore, holds_shards
from dcdit.data.latents.store import LatentStore, PerChannel
from dcdit.data.samples import Split, StoredSamples, sample_rng

ACCEPTED = (
    "*.safetensors shards, dataset.json with .npy moments (folder or .zip), *_features and *_labels folders of .npy, "
    "latents.npy and labels.npy, or an .npz of both"
)


class LatentDataset(StoredSamples):
    """Latents from disk, read one by one. What is at ``path`` says the file format:

    :class:`~dcdit.data.latents.shards.ShardStore` of ``dcdit extract`` and LightningDiT,
    :class:`~dcdit.data.latents.moments.MomentStore` of EDM2 and REPA, :class:`~dcdit.data.latents.pairs.PairStore` of
    fast-DiT and the official DC-DiT, or :class:`~dcdit.data.latents.arrays.ArrayStore`. Each defines what a model sees
    of what is stored.

    Args:
        path: folder or file.
        split: ``"train"`` or ``"held_out"``.
        held_out: fraction of the latents in the held-out split.
        flip: show the latent of the mirrored image at random while training, if the format stores it. (A mirrored
            latent is not the latent of the mirrored image.)
        seed: sample n is a pure function of (seed, n); held-out samples do not depend on it.
        scale: a model sees stored latents times this instead; 1 takes them as they are stored.
        skip_damaged: leave out what is missing or cannot be read, with a warning, instead of stopping.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: none of these formats, or a damaged file, which is named.

    Example:
        >>> import numpy as np
        >>> from dcdit.data import LatentDataset
        >>> np.savez("latents.npz", latents=np.full((2, 4, 8, 8), 0.5, np.float32), labels=np.array([3, 3]))
        >>> x, label = LatentDataset("latents.npz", held_out=0)[0]
        >>> x.shape, x.unique().tolist(), label
        (torch.Size([4, 8, 8]), [0.5], 3)
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        held_out: float = 0.1,
        flip: bool = True,
        seed: int = 0,
        scale: float | None = None,
        skip_damaged: bool = False,
    ) -> None:
        self.store = open_latents(Path(path), skip_damaged)
        self.shape = self.store.shape
        self.shift, self.scale = self.store.shift_and_scale() if scale is None else (0.0, scale)
        if self.store.unscaled:
            self.notes = {"latent_range": json.dumps([_as_list(self.shift), _as_list(self.scale)])}
        self.class_names = self.store.class_names or tuple(map(str, range(int(self.store.labels.max()) + 1)))
        self.split = Split(split, len(self.store.labels), held_out, seed, path)
        self.flip = flip and split == "train" and self.store.has_mirrored
        self.seed = seed if split == "train" else 0
        self.skip_damaged = skip_damaged

    def load(self, item: int, n: int) -> tuple[Tensor, int]:
        rng = sample_rng(self.seed, n)
        mirrored = self.flip and bool(rng.integers(2))
        latent = self.store.read(item, mirrored, rng)
        return (latent - self.shift) * self.scale, int(self.store.labels[item])


def open_latents(path: Path, skip_damaged: bool) -> LatentStore:
    """The latents at a path, in any of the file formats. Arguments and errors as in :class:`LatentDataset`."""
    if not path.exists():
        raise FileNotFoundError(f"no latents at {str(path)!r}")
    moments = find_moments(path)
    if moments is not None:
        return MomentStore(moments, skip_damaged)
    if holds_shards(path):
        return ShardStore(path, skip_damaged)
    pairs = find_pairs(path)
    if pairs is not None:
        return PairStore(*pairs, skip_damaged)
    if holds_arrays(path):
        return ArrayStore(path)
    images = ""
    if path.is_dir() and any(file.suffix.lower() in SUFFIXES for glob in ("*", "*/*") for file in path.glob(glob)):
        images = "; it holds images: dcdit extract makes latents of them, data.kind=folder trains on them as they are"
    raise ValueError(f"{path} holds no latents in a known file format; accepted: {ACCEPTED}{images}")


def _as_list(value: PerChannel) -> list[float]:
    return value.flatten().tolist() if isinstance(value, Tensor) else [value]
