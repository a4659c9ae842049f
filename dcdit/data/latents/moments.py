"""Moments of an autoencoder's posterior, one ``.npy`` per image, in a folder or a zip: the format of EDM2 and REPA."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dcdit.data.autoencoder import SD_VAE_SCALE
from dcdit.data.labels import MAX_CLASSES
from dcdit.data.latents.files import Files, FolderFiles, ZipFiles, open_zip, read_npy
from dcdit.data.latents.store import LatentStore, as_latent, finite, first_readable
from dcdit.data.samples import DamagedFile
from dcdit.utils.inside import is_inside
from dcdit.utils.reading import parse_json, read_bytes

INDEX = "dataset.json"
INDEX_BYTES = 1 << 30
"""It may have so many; that of ImageNet has 60 million."""
FOLDER = "vae-sd"
"""REPA's name for the folder of moments inside its data folder."""


class MomentStore(LatentStore):
    """``dataset.json``, ``{"labels": [["00000/img-mean-std-00000000.npy", 217], ...]}``, and float (2C, H, W) arrays.

    The first C channels are means. The others are standard deviations, as NVlabs/edm2 and sihyun-yu/REPA write them, or
    logarithms of variances, as diffusers gives them. The first image decides which, since only logarithms are negative.
    A latent is drawn anew for every sample: mean + std * noise, times 0.18215 as in REPA. (EDM2's own files look the
    same but come from pixels in [0, 1], and have another scale and bias.)

    Without labels (null) every image is of class 0.

    Args:
        path: a folder or an uncompressed zip with ``dataset.json`` at its root.
        skip_damaged: see :class:`dcdit.data.LatentDataset`.

    Raises:
        ValueError: ``dataset.json`` is unreadable, or the zip is unreadable or compressed.
        DamagedFile: no moments in the first file.
    """

    unscaled = True

    def __init__(self, path: Path, skip_damaged: bool = False) -> None:
        self.files, labels = _open_files(path)
        self.labels = np.array(labels, np.int64)
        first = first_readable(self._read_moments, len(labels), skip_damaged)
        if len(first) % 2:
            raise ValueError(f"{path} holds arrays of {len(first)} channels; accepted: means and as many spreads")
        self.shape = (len(first) // 2, *first.shape[1:])
        self.logarithmic = bool((first[self.shape[0] :] < 0).any())

    def shift_and_scale(self) -> tuple[float, float]:
        return 0.0, SD_VAE_SCALE

    def read(self, item: int, mirrored: bool, rng: np.random.Generator) -> Tensor:
        channels, height, width = self.shape
        mean, spread = self._read_moments(item, (2 * channels, height, width)).split(channels)
        if self.logarithmic:
            # The same bounds as in diffusers' DiagonalGaussianDistribution.
            spread = spread.clamp(-30, 20).mul(0.5).exp()
        elif (spread < 0).any():
            raise DamagedFile(f"{self.files.path_of(item)} holds negative standard deviations, others do not")
        noise = torch.from_numpy(rng.standard_normal(self.shape, np.float32))
        return finite(mean + spread * noise, self.files.path_of(item))

    def _read_moments(self, item: int, shape: tuple[int, ...] | None = None) -> Tensor:
        return as_latent(read_npy(self.files, item), self.files.path_of(item), shape)


def find_moments(path: Path) -> Path | None:
    """The folder or zip of moments: ``path`` itself, or ``vae-sd`` inside a folder of REPA. None if there is none."""
    if path.suffix == ".zip":
        return path
    return next((folder for folder in (path, path / FOLDER) if (folder / INDEX).is_file()), None)


def _open_files(path: Path) -> tuple[Files, list[int]]:
    if path.is_dir():
        present = (str(file.relative_to(path)) for file in path.rglob("*.npy"))
        names, labels = _parse_index(path, read_bytes(path / INDEX, INDEX_BYTES), present)
        return FolderFiles(path, names), labels
    try:
        with open_zip(path) as archive:
            if archive.getinfo(INDEX).file_size > INDEX_BYTES:
                raise ValueError(f"{path}: {INDEX} is too large; accepted: at most {INDEX_BYTES} bytes")
            names, labels = _parse_index(path, archive.read(INDEX), archive.namelist())
            return ZipFiles(archive, path, names), labels
    except KeyError:
        raise ValueError(f"{path} is no zip of moments: there is no {INDEX} in it") from None


def _parse_index(path: Path, data: bytes, present: Iterable[str]) -> tuple[list[str], list[int]]:
    """(names of the arrays, sorted; label of each). ``present`` are the names of all files there are."""
    index = parse_json(data, f"{path}: {INDEX}")
    if not isinstance(index, dict) or not isinstance(index.get("labels", 0), list | None):
        raise ValueError(f"{path}: {INDEX} has no list of labels; accepted: {{'labels': [[name, label], ...]}} or null")
    given = index["labels"]
    given = given if given is not None else [[name, 0] for name in present if name.endswith(".npy")]
    odd = next((pair for pair in given if not isinstance(pair, list) or len(pair) != 2), None)
    if odd is not None:
        raise ValueError(f"{path}: {INDEX} lists {odd!r}; accepted: pairs of a name and a label")
    pairs = {name if isinstance(name, str) else repr(name): label for name, label in given}
    for name, label in pairs.items():
        # bool is a kind of int in Python
        if not name.endswith(".npy") or type(label) is not int or not 0 <= label < MAX_CLASSES:
            raise ValueError(
                f"{path}: {INDEX} lists {name!r} with label {label!r}; accepted: .npy, integers from 0 to "
                f"{MAX_CLASSES - 1}"
            )
        if not is_inside(name):
            raise ValueError(f"{path}: {INDEX} lists {name!r}; accepted: files inside the folder")
    if not pairs:
        raise ValueError(f"{path} holds no moments")
    if len(pairs) < len(given):
        raise ValueError(f"{path}: {INDEX} lists {len(given) - len(pairs)} files twice; accepted: one label for each")
    names = sorted(pairs)
    return names, [pairs[name] for name in names]
