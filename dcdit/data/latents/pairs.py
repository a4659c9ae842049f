"""Feature folders of fast-DiT and of the official DC-DiT: two ``.npy`` per image, latent and label."""

import os
from pathlib import Path

import numpy as np
from torch import Tensor

from dcdit.data.labels import MAX_CLASSES
from dcdit.data.latents.files import FolderFiles, read_npy
from dcdit.data.latents.store import LatentStore, as_latent, first_readable
from dcdit.data.samples import DamagedFile, skip_or_raise

PROGRESS_MIN_FILES = 20_000
"""Reading this many label files or more shows a progress bar."""


class PairStore(LatentStore):
    """``imagenet256_features/0.npy``, float (1, C, H, W), and ``imagenet256_labels/0.npy``, one integer; and so on.

    As chuanyangjin/fast-DiT and AMD-AGI/DynamicChunkingDiT write them: drawn once, mirrored at random, and scaled by
    0.18215 already. A latent and its label have the same file name. All labels are read at once.

    Args:
        features, labels: the two folders, as :func:`find_pairs` finds them.
        skip_damaged: leave out incomplete pairs, with a warning.

    Raises:
        DamagedFile: a latent without a label or the reverse, or a file that holds no label.
        ValueError: no pairs.
    """

    def __init__(self, features: Path, labels: Path, skip_damaged: bool = False) -> None:
        folders = (features, labels)
        names = [{name for name in os.listdir(folder) if name.endswith(".npy")} for folder in folders]
        paired = sorted(names[0] & names[1], key=lambda name: (len(name), name))
        alone = sorted(names[0] ^ names[1])
        if alone:
            folder = folders[alone[0] in names[0]]
            message = f"{folder / alone[0]} is missing, one of {len(alone)} without its other half"
            skip_or_raise(DamagedFile(message), skip_damaged)
        found = _read_labels(FolderFiles(labels, paired), skip_damaged)
        paired = [name for name, label in zip(paired, found, strict=True) if label is not None]
        if not paired:
            raise ValueError(f"{features} and {labels} hold no pairs of .npy files")
        self.files = FolderFiles(features, paired)
        self.labels = np.array([label for label in found if label is not None])
        channels, height, width = first_readable(self._read_latent, len(paired), skip_damaged).shape
        self.shape = (channels, height, width)

    def read(self, item: int, mirrored: bool, rng: np.random.Generator) -> Tensor:
        return self._read_latent(item, self.shape)

    def _read_latent(self, item: int, shape: tuple[int, ...] | None = None) -> Tensor:
        return as_latent(read_npy(self.files, item), self.files.path_of(item), shape)


def find_pairs(path: Path) -> tuple[Path, Path] | None:
    """(folder of features, folder of labels) in a folder; None if there are none."""
    for features in sorted(path.glob("*features")):
        labels = features.with_name(features.name.removesuffix("features") + "labels")
        if features.is_dir() and labels.is_dir():
            return features, labels
    return None


def _read_labels(files: FolderFiles, skip_damaged: bool) -> list[int | None]:
    """The label in each file; None where it is damaged and ``skip_damaged``."""
    from tqdm import tqdm

    count = len(files.names)
    labels: list[int | None] = []
    header: bytes | None = None
    for index in tqdm(range(count), desc="labels", unit="file", disable=count < PROGRESS_MIN_FILES):
        try:
            data = files.read(index)
            # All headers are the same, and parsing a million of them takes minutes.
            if data[:-8] == header:
                label = int.from_bytes(data[-8:], "little", signed=True)
            else:
                array = read_npy(files, index)
                if array.size != 1 or array.dtype.kind not in "iu":
                    raise DamagedFile(f"{files.path_of(index)} is {array.dtype} {array.shape}; accepted: one integer")
                label = int(array.item())
                header = data[:-8] if array.dtype == np.dtype("<i8") else None
            if not 0 <= label < MAX_CLASSES:
                raise DamagedFile(f"{files.path_of(index)} holds the label {label}; accepted: 0 to {MAX_CLASSES - 1}")
            labels.append(label)
        except DamagedFile as error:
            skip_or_raise(error, skip_damaged)
            labels.append(None)
    return labels
