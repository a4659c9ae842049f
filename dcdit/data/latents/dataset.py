"""Latents that an autoencoder made, in the layouts that people have; :func:`open_latents` tells them apart."""

import json
from pathlib import Path

from torch import Tensor

from dcdit.data.latents.moments import Moments, find_moments
from dcdit.data.latents.pairs import FeaturePairs, find_pairs
from dcdit.data.latents.shards import Shards, find_shards
from dcdit.data.latents.store import LatentStore
from dcdit.data.npz import ArrayLatents, has_latents
from dcdit.data.samples import Split, StoredSamples, sample_rng

ACCEPTED = (
    "*.safetensors shards, dataset.json with .npy moments (folder or .zip), *_features and *_labels folders of .npy, "
    "latents.npy and labels.npy, or an .npz of both"
)


class LatentDataset(StoredSamples):
    """Latents from disk, read one by one; the layout is recognised by what is at ``path``.

    :class:`~.shards.Shards` of ``dcdit extract`` and LightningDiT, :class:`~.moments.Moments` of EDM2 and REPA,
    :class:`~.pairs.FeaturePairs` of fast-DiT and the official DC-DiT, :class:`~.npz.ArrayLatents`. Each says what a
    model sees of what is stored.

    Args:
        path: folder or file.
        split: ``"train"`` or ``"held_out"``.
        held_out: share of the latents in the held-out split.
        flip: show the latent of the mirrored image at random while training, where the layout stores it. (A mirrored
            latent is not the latent of the mirrored image.)
        seed: sample n is a pure function of (seed, n); held-out samples do not depend on it.
        scale: a model sees stored latents times this instead; 1 takes them as they are stored.
        skip_damaged: leave out what is missing or cannot be read, with a warning, instead of stopping.

    Raises:
        FileNotFoundError: nothing there. ValueError: nothing of the above, or it is damaged; the file is named.
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
        self.shift, self.scale = self.store.range() if scale is None else (0.0, scale)
        if self.store.raw:
            ends = (self.shift, self.scale)
            lists = [end.flatten().tolist() if isinstance(end, Tensor) else [end] for end in ends]
            self.notes = {"latent_range": json.dumps(lists)}
        self.class_names = self.store.class_names or tuple(map(str, range(int(self.store.labels.max()) + 1)))
        self.split = Split(split, len(self.store.labels), held_out, seed, path)
        self.flip = flip and split == "train" and self.store.mirrored
        self.seed = seed if split == "train" else 0
        self.skip_damaged = skip_damaged

    def load(self, item: int, n: int) -> tuple[Tensor, int]:
        rng = sample_rng(self.seed, n)
        mirrored = self.flip and bool(rng.integers(2))
        latent = self.store.read(item, mirrored, rng)
        return (latent - self.shift) * self.scale, int(self.store.labels[item])


def open_latents(path: Path, skip_damaged: bool = False) -> LatentStore:
    """The latents at a path, whatever their layout. Arguments and errors as in :class:`LatentDataset`."""
    if not path.exists():
        raise FileNotFoundError(f"no latents at {str(path)!r}")
    moments = find_moments(path)
    if moments is not None:
        return Moments(moments, skip_damaged)
    if find_shards(path):
        return Shards(path, skip_damaged)
    pairs = find_pairs(path)
    if pairs is not None:
        return FeaturePairs(*pairs, skip_damaged)
    if has_latents(path):
        return ArrayLatents(path)
    raise ValueError(f"{path} holds no latents in a known layout; accepted: {ACCEPTED}")
