"""Features of image sets, kept on disk batch by batch, and the statistics that FID compares."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dcdit.evaluate.distances import Gaussian
from dcdit.evaluate.images import ImageSource, npz_arrays, open_images
from dcdit.utils.files import atomically, recover
from dcdit.utils.images import Pixels
from dcdit.utils.modules import evaluating
from dcdit.utils.tensors import save_tensors

KINDS = ("pooled", "logits", "spatial")
SPATIAL_CHANNELS = 7
"""sFID takes the first seven channels of the spatial features (Nash et al., arXiv 2103.03841): 17 x 17 x 7 = 2023."""


@dataclass(frozen=True)
class Statistics:
    """What FID and sFID need of a set of images.

    Attributes:
        pooled, spatial: Gaussians fitted to the features; ``spatial`` may be missing.
        count: images behind them, if known.
        extractor: identity of the network, if known.
    """

    pooled: Gaussian
    spatial: Gaussian | None = None
    count: int | None = None
    extractor: str | None = None

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` with ADM's names: mu, sigma, and for sFID mu_s, sigma_s. Atomic."""
        arrays: dict[str, Any] = {"mu": self.pooled.mean.numpy(), "sigma": self.pooled.covariance().numpy()}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean.numpy(), "sigma_s": self.spatial.covariance().numpy()}
        if self.count is not None:
            arrays["count"] = np.int64(self.count)
        if self.extractor is not None:
            arrays["extractor"] = np.str_(self.extractor)

        def write(file: Path) -> None:
            with file.open("wb") as target:  # np.savez adds the suffix .npz to a path without it
                np.savez(target, **arrays)

        atomically(Path(path), write)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read what :meth:`save` wrote, or the statistics of an ADM or DiT reference batch.

        Raises:
            FileNotFoundError, ValueError: nothing there, or no such arrays in it.
        """
        path = Path(path)
        if "mu" not in npz_arrays(path):
            raise ValueError(f"{path} holds no statistics; accepted: an .npz with mu and sigma")
        with np.load(path, allow_pickle=False) as archive:
            spatial = _gaussian(archive, "mu_s", "sigma_s", path) if "mu_s" in archive else None
            count = int(archive["count"]) if "count" in archive else None
            extractor = str(archive["extractor"]) if "extractor" in archive else None
            return cls(_gaussian(archive, "mu", "sigma", path), spatial, count, extractor)


@dataclass(frozen=True)
class Features:
    """Features of N images on the CPU, float32.

    Attributes:
        pooled: (N, D).
        logits: (N, classes), or None if the extractor gives none.
        spatial: (N, h * w * 7), or None; positions first, then channels, as in ADM's stored statistics.
        extractor: identity of the network, if it has one.
        size: (H, W) of the images, if known.
    """

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None
    extractor: str | None = None
    size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.pooled)

    def rows(self, index: Tensor) -> "Features":
        """The features of some of the images.

        Args:
            index: (n,) integer numbers of the images.
        """
        logits, spatial = (None if f is None else f[index] for f in (self.logits, self.spatial))
        return Features(self.pooled[index], logits, spatial, self.extractor, self.size)

    @cached_property
    def statistics(self) -> Statistics:
        """Gaussians fitted to the features."""
        spatial = None if self.spatial is None else Gaussian.fit(self.spatial)
        return Statistics(Gaussian.fit(self.pooled), spatial, len(self), self.extractor)


def _gaussian(archive: Mapping[str, Any], mu: str, sigma: str, path: Path) -> Gaussian:
    if sigma not in archive:
        raise ValueError(f"{path} holds {mu} without {sigma}; accepted: both")
    mean, covariance = (torch.from_numpy(np.asarray(archive[name])) for name in (mu, sigma))
    if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)) or not mean.is_floating_point():
        raise ValueError(
            f"{path}: {mu} has shape {tuple(mean.shape)} and {sigma} {tuple(covariance.shape)}; "
            "accepted: float (D,) and (D, D)"
        )
    return Gaussian.of(mean, covariance)


@torch.no_grad()
def extract_features(
    images: ImageSource | Features,
    extractor: nn.Module,
    *,
    size: int | None = None,
    batch_size: int = 50,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Features:
    """Features of images; see :mod:`dcdit.evaluate.extractors` for the contract of the network.

    Args:
        images: see :func:`dcdit.evaluate.images.open_images`. Features are returned as they are.
        extractor: the network; its device does the work.
        size: of the images of a folder, see :func:`dcdit.evaluate.images.open_images`.
        batch_size: images per forward pass.
        cache: folder that keeps the features of every batch under a hash of its pixels and the extractor. Images seen
            before cost nothing then, and an interrupted run continues.
        progress: show a bar.

    Raises:
        ValueError: bad images, an extractor that breaks the contract, or a cache for one without identity.
    """
    if isinstance(images, Features):
        return images
    from tqdm import tqdm

    source = open_images(images, size)
    identity = getattr(extractor, "identity", None)
    if cache is not None and identity is None:
        raise ValueError(f"{type(extractor).__name__} has no identity, so its features cannot be cached; give it one")
    if cache is not None:
        recover(Path(cache))
    with evaluating(extractor), tqdm(total=source.count, desc="features", unit="image", disable=not progress) as bar:
        batches, image_size = [], None
        for pixels in source.batches(batch_size):
            batches.append(_cached(pixels, extractor, identity, cache))
            image_size = (pixels.shape[1], pixels.shape[2])
            bar.update(len(pixels))
    if len({frozenset(batch) for batch in batches}) > 1:
        raise ValueError(f"{type(extractor).__name__} returned {sorted(batches[0])} once and something else later")
    joined = {kind: torch.cat([batch[kind] for batch in batches]) for kind in batches[0]}
    return Features(joined["pooled"], joined.get("logits"), joined.get("spatial"), identity, image_size)


def _cached(pixels: Pixels, extractor: nn.Module, identity: str | None, cache: str | Path | None) -> dict[str, Tensor]:
    if cache is None:
        return _forward(pixels, extractor)
    key = hashlib.sha256(f"{identity} {pixels.shape}".encode() + pixels.tobytes()).hexdigest()
    file = Path(cache) / f"{key[:32]}.safetensors"
    if file.is_file():
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged: {' '.join(str(error).split())}; delete it") from None
    features = _forward(pixels, extractor)
    atomically(file, lambda target: save_tensors(target, features), clean=False)
    return features


def _forward(pixels: Pixels, extractor: nn.Module) -> dict[str, Tensor]:
    """The features of one batch by name; spatial ones are flattened."""
    weight = next(chain(extractor.parameters(), extractor.buffers()), None)
    images = torch.tensor(pixels).permute(0, 3, 1, 2)
    returned = extractor(images if weight is None else images.to(weight.device))
    features = _named(returned, type(extractor).__name__)
    for kind, tensor in features.items():
        dims = 4 if kind == "spatial" else 2
        wide_enough = kind != "spatial" or (tensor.dim() == 4 and tensor.shape[1] >= SPATIAL_CHANNELS)
        if tensor.dim() != dims or len(tensor) != len(pixels) or not tensor.is_floating_point() or not wide_enough:
            wanted = f"({len(pixels)}, D)" if dims == 2 else f"({len(pixels)}, at least {SPATIAL_CHANNELS}, h, w)"
            raise ValueError(
                f"{type(extractor).__name__} returned {kind} of shape {tuple(tensor.shape)} and {tensor.dtype}; "
                f"accepted: float {wanted}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{type(extractor).__name__} returned {kind} that are not finite")
    if "spatial" in features:
        features["spatial"] = features["spatial"][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
    return {kind: tensor.float().cpu().contiguous() for kind, tensor in features.items()}


def _named(returned: Any, name: str) -> dict[str, Tensor]:
    if isinstance(returned, Tensor):
        returned = (returned,)
    if isinstance(returned, tuple) and 0 < len(returned) <= len(KINDS):
        returned = dict(zip(KINDS, returned, strict=False))
    if not isinstance(returned, Mapping):
        raise ValueError(f"{name} returned {type(returned).__name__}; accepted: a tensor, or {', '.join(KINDS)}")
    given = {kind: returned[kind] for kind in KINDS if returned.get(kind) is not None}
    if "pooled" not in given or not all(isinstance(tensor, Tensor) for tensor in given.values()):
        raise ValueError(f"{name} returned {sorted(returned)}; accepted: tensors by the names {', '.join(KINDS)}")
    return given
