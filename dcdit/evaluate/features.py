"""Features of image sets, kept on disk batch by batch, and the statistics that FID compares."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dcdit.data.archives import open_npz
from dcdit.evaluate.cache import FeatureCache
from dcdit.evaluate.distances import Gaussian
from dcdit.evaluate.images import ImageSource, open_images
from dcdit.utils.files import atomically, recover
from dcdit.utils.images import Pixels
from dcdit.utils.modules import evaluating

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

    Example:
        >>> import torch
        >>> from dcdit.evaluate import Statistics
        >>> from dcdit.evaluate.distances import Gaussian
        >>> statistics = Statistics(Gaussian(torch.tensor([1.0, 2.0]).double(), torch.eye(2).double()), count=100)
        >>> statistics.save("reference.npz")
        >>> again = Statistics.load("reference.npz")
        >>> again.pooled.mean.tolist(), (again.pooled.factor @ again.pooled.factor.T).round(decimals=6).tolist()
        ([1.0, 2.0], [[1.0, 0.0], [0.0, 1.0]])
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
            FileNotFoundError: nothing there.
            ValueError: no such arrays in it, or arrays that no set of images has: numbers that are not finite, a sigma
                that is not symmetric or has negative eigenvalues, a count that is no positive integer.
        """
        path = Path(path)
        with open_npz(path) as archive:
            if "mu" not in archive:
                raise ValueError(f"{path} holds no statistics; accepted: an .npz with mu and sigma")
            names = ("mu", "sigma", "mu_s", "sigma_s", "count", "extractor")
            arrays = {name: archive.read(name) for name in names if name in archive}
        spatial = _gaussian(arrays, "mu_s", "sigma_s", path) if {"mu_s", "sigma_s"} & arrays.keys() else None
        return cls(_gaussian(arrays, "mu", "sigma", path), spatial, _count(arrays, path), _extractor(arrays, path))


@dataclass(frozen=True)
class Features:
    """Features of N images on the CPU, float32.

    Attributes:
        pooled: (N, D).
        logits: (N, classes), or None if the extractor gives none.
        spatial: (N, h * w * 7), or None; positions first, then channels, as in ADM's stored statistics.
        extractor: identity of the network, if it has one.
        size: (H, W) of the images, if known.

    Raises:
        ValueError: the kinds of features are not of as many images.

    Example:
        >>> import torch
        >>> from dcdit.evaluate import Features
        >>> features = Features(torch.arange(6.0).view(3, 2))
        >>> features.rows(torch.tensor([2, 0])).pooled.tolist()
        [[4.0, 5.0], [0.0, 1.0]]
    """

    pooled: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None
    extractor: str | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        counts = {kind: len(rows) for kind in KINDS if (rows := getattr(self, kind)) is not None}
        if len(set(counts.values())) > 1:
            raise ValueError(f"features of {counts} images; accepted: of the same images")

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


def _gaussian(arrays: Mapping[str, Any], mu: str, sigma: str, path: Path) -> Gaussian:
    if not {mu, sigma} <= arrays.keys():
        there, missing = (mu, sigma) if mu in arrays else (sigma, mu)
        raise ValueError(f"{path} holds {there} without {missing}; accepted: both")
    mean, covariance = arrays[mu], arrays[sigma]
    for name, array in ((mu, mean), (sigma, covariance)):
        if array.dtype.kind != "f":
            raise ValueError(f"{path}: {name} is {array.dtype}; accepted: float")
    try:
        mean, covariance = (torch.from_numpy(array.astype(np.float64)) for array in (mean, covariance))
        return Gaussian.of(mean, covariance, (mu, sigma))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _count(arrays: Mapping[str, Any], path: Path) -> int | None:
    count = arrays.get("count")
    if count is None:
        return None
    if count.shape != () or count.dtype.kind not in "iu" or count < 1:
        found = f"{count.dtype} {count.shape or count.item()}"
        raise ValueError(f"{path}: count is {found}; accepted: an integer of at least 1")
    return int(count)


def _extractor(arrays: Mapping[str, Any], path: Path) -> str | None:
    extractor = arrays.get("extractor")
    if extractor is None:
        return None
    if extractor.shape != () or extractor.dtype.kind != "U" or not str(extractor).isprintable():
        raise ValueError(f"{path}: extractor is {extractor.dtype} {extractor.shape}; accepted: a printable text")
    return str(extractor)


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
        cache: folder that keeps the features of every batch, see :class:`~dcdit.evaluate.cache.FeatureCache`. Images
            seen before cost nothing then, and an interrupted run continues.
        progress: show a bar.

    Raises:
        ValueError: bad images, an extractor that breaks the contract, or a cache for one without identity.

    Example:
        >>> import torch
        >>> from dcdit.evaluate import extract_features
        >>> class MeanColour(torch.nn.Module):
        ...     def forward(self, images):  # uint8 (N, 3, H, W)
        ...         return images.float().mean((2, 3))
        >>> images = torch.full((3, 8, 8, 3), 7, dtype=torch.uint8)
        >>> extract_features(images, MeanColour(), progress=False).pooled.tolist()
        [[7.0, 7.0, 7.0], [7.0, 7.0, 7.0], [7.0, 7.0, 7.0]]
    """
    if isinstance(images, Features):
        return images
    from tqdm import tqdm

    source = open_images(images, size)
    identity = getattr(extractor, "identity", None)
    if cache is not None and identity is None:
        raise ValueError(f"{type(extractor).__name__} has no identity, so its features cannot be cached; give it one")
    compute = partial(_forward, extractor)
    store = None if cache is None or identity is None else FeatureCache(Path(cache), identity)
    if cache is not None:
        recover(Path(cache))
    with evaluating(extractor), tqdm(total=source.count, desc="features", unit="image", disable=not progress) as bar:
        batches, image_size = [], None
        for pixels in source.batches(batch_size):
            batches.append(compute(pixels) if store is None else store.get(pixels, compute))
            image_size = (pixels.shape[1], pixels.shape[2])
            bar.update(len(pixels))
    if store is not None:
        store.warn()
    widths = [{kind: tensor.shape[1] for kind, tensor in batch.items()} for batch in batches]
    other = next((found for found in widths if found != widths[0]), None)
    if other is not None:
        raise ValueError(f"{type(extractor).__name__} returned features of widths {widths[0]} once and {other} later")
    joined = {kind: torch.cat([batch[kind] for batch in batches]) for kind in batches[0]}
    return Features(joined["pooled"], joined.get("logits"), joined.get("spatial"), identity, image_size)


def _forward(extractor: nn.Module, pixels: Pixels) -> dict[str, Tensor]:
    """The features of one batch by name; spatial ones are flattened."""
    weight = next(chain(extractor.parameters(), extractor.buffers()), None)
    images = torch.tensor(pixels, device="cpu").permute(0, 3, 1, 2)
    returned = extractor(images if weight is None else images.to(weight.device))
    called = str(getattr(extractor, "path", type(extractor).__name__))
    features = _named(returned, called)
    for kind, tensor in features.items():
        dims = 4 if kind == "spatial" else 2
        wide_enough = tensor.numel() and (
            kind != "spatial" or (tensor.dim() == 4 and tensor.shape[1] >= SPATIAL_CHANNELS)
        )
        if tensor.dim() != dims or len(tensor) != len(pixels) or not tensor.is_floating_point() or not wide_enough:
            wanted = f"({len(pixels)}, D)" if dims == 2 else f"({len(pixels)}, at least {SPATIAL_CHANNELS}, h, w)"
            raise ValueError(
                f"{called} returned {kind} of shape {tuple(tensor.shape)} and {tensor.dtype}; accepted: float {wanted}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{called} returned {kind} that are not finite")
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
