"""Safetensors shards of latents: the format of LightningDiT, and with a manifest that of ``dcdit extract``."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit.data.labels import MAX_CLASSES, as_labels
from dcdit.data.latents.files import PerProcess
from dcdit.data.latents.manifest import MANIFEST_FILE, Manifest, read_manifest, size_problem
from dcdit.data.latents.store import LatentStore, PerChannel, finite
from dcdit.data.samples import DamagedFile, skip_or_raise
from dcdit.utils.pickles import check_dense, load_pickled
from dcdit.utils.tensors import open_tensors
from dcdit.utils.text import one_line

LATENTS, MIRRORED, LABELS = "latents", "latents_flip", "labels"
STATISTICS = "latents_stats.pt"
FLOATS = ("F16", "BF16", "F32", "F64")
"""Dtypes of latents, as safetensors calls them."""
Slices = dict[str, Any]
"""The tensors of one open shard, by name, to be read row by row."""


class ShardStore(LatentStore):
    """``*.safetensors`` with ``latents`` (N, C, H, W), ``labels`` (N,) and, all or none, ``latents_flip`` like latents.

    Opening checks the sizes of the shards; ``dcdit extract --verify`` checks their contents. What a model sees is in
    ``manifest.json``. Without one (hustvl/LightningDiT) it is (latent - mean) / std, with the statistics (1, C, 1, 1)
    of ``latents_stats.pt``.

    Args:
        path: the folder.
        skip_damaged: leave out shards that are missing or damaged, with a warning.

    Raises:
        DamagedFile: a shard is missing or damaged.
        ValueError: no shard, or images that are not encoded yet.
    """

    unscaled = True

    def __init__(self, path: Path, skip_damaged: bool = False) -> None:
        manifest = read_manifest(path)
        if manifest is not None and manifest.done < manifest.images:
            raise ValueError(
                f"{path} holds {manifest.done} of {manifest.images} images; dcdit extract goes on where it stopped"
            )
        if manifest is None:
            files = sorted(path.glob("*.safetensors"))
        else:
            files = _of_right_size(path, manifest, skip_damaged)
            self.class_names = tuple(manifest.class_names)
        self.files: list[Path] = []
        labels: list[np.ndarray[Any, Any]] = []
        for file in files:
            try:
                labels.append(self._read_labels(file, first=not labels))
                self.files.append(file)
            except DamagedFile as error:
                skip_or_raise(error, skip_damaged)
        if not labels:
            raise ValueError(f"{path} holds no shard of latents that can be read")
        self.labels = np.concatenate(labels)
        self.starts = np.cumsum([0, *(len(part) for part in labels[:-1])])
        self._opened: PerProcess[dict[int, Slices]] = PerProcess(dict)
        self.path, self.manifest = path, manifest

    def shift_and_scale(self) -> tuple[PerChannel, PerChannel]:
        if self.manifest is None:
            return _read_statistics(self.path, self.shape[0])
        return self.manifest.shift, self.manifest.scale

    def read(self, item: int, mirrored: bool, rng: np.random.Generator) -> Tensor:
        shard = int(np.searchsorted(self.starts, item, side="right")) - 1
        opened = self._opened.get()
        if shard not in opened:
            opened[shard] = _open(self.files[shard])
        row = item - int(self.starts[shard])
        return finite(opened[shard][MIRRORED if mirrored else LATENTS][row].float(), f"{self.files[shard]}, row {row}")

    def _read_labels(self, file: Path, first: bool) -> np.ndarray[Any, Any]:
        """The labels of a shard. DamagedFile unless its tensors are like those of the first."""
        slices = _open(file)
        if not {LATENTS, LABELS} <= slices.keys():
            raise DamagedFile(f"{file} holds {', '.join(sorted(slices))}; accepted: {LATENTS} and {LABELS}")
        if len(slices[LATENTS].get_shape()) != 4 or 0 in slices[LATENTS].get_shape():
            raise DamagedFile(f"{file}: {LATENTS} has the shape {slices[LATENTS].get_shape()}; accepted: (N, C, H, W)")
        count, *shape = slices[LATENTS].get_shape()
        if first:
            self.shape, self.has_mirrored = tuple(shape), MIRRORED in slices
        for name in slices.keys() & {LATENTS, MIRRORED}:
            if slices[name].get_dtype() not in FLOATS:
                raise DamagedFile(f"{file}: {name} is {slices[name].get_dtype()}; accepted: {', '.join(FLOATS)}")
        labels = _integers(slices[LABELS][:], file)
        expected = {LATENTS: [count, *self.shape], MIRRORED: [count, *self.shape], LABELS: [count]}
        for name, accepted in expected.items():
            found = slices[name].get_shape() if name in slices else None
            if found != accepted and (name != MIRRORED or self.has_mirrored):
                raise DamagedFile(f"{file}: {name} has the shape {found}; accepted: {accepted}")
        return as_labels(labels, count, str(file), len(self.class_names or ()) or MAX_CLASSES)


def holds_shards(path: Path) -> bool:
    """Whether a path looks like this file format."""
    return (path / MANIFEST_FILE).is_file() or next(path.glob("*.safetensors"), None) is not None


def _integers(labels: Tensor, file: Path) -> np.ndarray[Any, Any]:
    """Labels as stored. Floating ones become int64, if their dtype has room for every whole number up to them."""
    if labels.is_floating_point():
        exact = round(2 / torch.finfo(labels.dtype).eps)  # 256 in bfloat16
        values = labels.double()
        if not ((values == values.trunc()) & (values.abs() < exact)).all():
            raise DamagedFile(f"{file}: labels are {labels.dtype}; accepted: integers, or whole numbers below {exact}")
        labels = values.long()
    return labels.numpy()


def _of_right_size(path: Path, manifest: Manifest, skip_damaged: bool) -> list[Path]:
    """The shards whose size is what the manifest says."""
    files = []
    for number, shard in enumerate(manifest.shards, 1):
        problem = size_problem(path, shard)
        if problem is None:
            files.append(path / shard.file)
        else:
            of = f"shard {number} of {len(manifest.shards)}, {shard.images} images"
            skip_or_raise(DamagedFile(f"{problem} ({of})"), skip_damaged)
    return files


def _open(file: Path) -> Slices:
    try:
        with open_tensors(file) as opened:
            return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, ValueError) as error:
        raise DamagedFile(f"cannot read {one_line(error)}") from None


def _read_statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """(mean, 1 / std) of ``latents_stats.pt``, each (C, 1, 1)."""
    file = path / STATISTICS
    if not os.path.lexists(file):
        raise ValueError(
            f"{path} has neither {MANIFEST_FILE} nor {STATISTICS}; accepted: one of them, or data.scale (1: as stored)"
        )
    statistics = load_pickled(file)
    named = {name: statistics.get(name) for name in ("mean", "std")} if isinstance(statistics, dict) else {}
    tensors = {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}
    check_dense(tensors, file)
    mean, std = tensors.get("mean"), tensors.get("std")
    if mean is None or std is None or mean.numel() != channels or std.numel() != channels:
        raise ValueError(
            f"{file} holds no mean and std of {channels} channels; accepted: tensors (1, {channels}, 1, 1)"
        )
    mean, std = (tensor.float().reshape(channels, 1, 1) for tensor in (mean, std))
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        found = f"the mean {mean.flatten().tolist()} and the std {std.flatten().tolist()}"
        raise ValueError(f"{file} holds {found}; accepted: finite numbers, a std above 0")
    return mean, 1 / std
