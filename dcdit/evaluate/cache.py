"""Features on disk, batch by batch, that are used again only if they are what was written."""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dcdit.data.samples import DataWarning
from dcdit.utils.files import atomically
from dcdit.utils.images import Pixels
from dcdit.utils.tensors import open_tensors, save_tensors
from dcdit.utils.text import one_line

FeaturesByKind = dict[str, Tensor]


class FeatureCache:
    """The features of every batch, under a hash of its pixels and of the extractor.

    A file also holds that hash and one of the features in it. A file that does not agree with them, or that holds
    other features than an extractor may return, is not used: the features are computed again, and a warning counts
    such files.

    Args:
        folder: where the files are.
        identity: text that changes whenever the features of the extractor do.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self._problems: list[str] = []

    def get(self, pixels: Pixels, compute: Callable[[Pixels], FeaturesByKind]) -> FeaturesByKind:
        """The features of a batch of images, from disk or from ``compute``."""
        key = hashlib.sha256(f"{self.identity} {pixels.shape}".encode() + pixels.tobytes()).hexdigest()
        file = self.folder / f"{key[:32]}.safetensors"
        if file.exists():
            try:
                return _read(file, key, len(pixels))
            except (OSError, ValueError) as error:
                self._problems.append(one_line(error))
        features = compute(pixels)
        metadata = {"batch": key, "features": _digest(features)}
        if file.is_file() or not file.exists():  # a pipe or a folder of that name is somebody else's
            atomically(file, lambda target: save_tensors(target, features, metadata), clean=False)
        return features

    def warn(self) -> None:
        """Say how many files were not used, if any, and why the first was not."""
        if self._problems:
            first = self._problems[0]
            text = f"features of {len(self._problems)} batches were computed again, because of {first}"
            warnings.warn(text, DataWarning, stacklevel=2)


def _read(file: Path, key: str, count: int) -> FeaturesByKind:
    """The features of ``count`` images. ValueError if the file holds anything else than what was written."""
    with open_tensors(file) as stored:
        metadata = stored.metadata() or {}
        features = {kind: stored.get_tensor(kind) for kind in stored.keys()}  # noqa: SIM118 (not a mapping)
    if metadata.get("batch") != key:
        raise ValueError(f"{file}: it is of other images or another extractor, or of an earlier version")
    for kind, tensor in features.items():
        if tensor.dim() != 2 or len(tensor) != count or tensor.dtype != torch.float32 or not tensor.isfinite().all():
            found = f"{kind} is {tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{file}: {found}; accepted: float32 ({count}, D), all of them finite")
    if "pooled" not in features or metadata.get("features") != _digest(features):
        raise ValueError(f"{file}: its features are not those that were written")
    return features


def _digest(features: dict[str, Tensor]) -> str:
    """A hash of names, shapes and values."""
    digest = hashlib.sha256()
    for kind, tensor in sorted(features.items()):
        digest.update(f"{kind} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
