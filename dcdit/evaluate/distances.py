"""Distances between sets of features: numbers from arrays, without images."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NEIGHBOURS = 3
"""k of precision and recall, as in ADM and in the paper that defines them."""
KID_SUBSETS, KID_SUBSET = 100, 1000
IS_SPLITS = 10
ROWS = 2048
"""Rows of a distance matrix that are held in memory at a time."""


@dataclass(frozen=True)
class Gaussian:
    """A mean and a factor of a covariance, float64.

    Attributes:
        mean: (D,).
        factor: (D, r), with covariance = factor @ factor.T. Few images make a thin factor and a cheap distance.
    """

    mean: Tensor
    factor: Tensor

    @classmethod
    def fit(cls, x: Tensor) -> "Gaussian":
        """The Gaussian of features (N, D), N at least 2; the covariance divides by N - 1."""
        x = x.double()
        mean = x.mean(0)
        centred = (x - mean) / (len(x) - 1) ** 0.5
        if len(x) <= x.shape[1]:
            return cls(mean, centred.T)
        return cls.of(mean, centred.T @ centred)

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor) -> "Gaussian":
        """From a mean (D,) and a symmetric covariance (D, D). Directions of no variance, to rounding, are left out."""
        values, vectors = torch.linalg.eigh(covariance.double())
        kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
        return cls(mean.double(), vectors[:, kept] * values[kept].sqrt())

    def covariance(self) -> Tensor:
        """(D, D)."""
        return self.factor @ self.factor.T


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) for the covariances A and B (FID: arXiv 1706.08500).

    With A = F F' and B = G G', the trace of the root is the sum of the singular values of F' G. This needs no root of a
    singular product and is exact where few images leave most directions empty. It also takes stored statistics, which
    torchmetrics does not.

    Raises:
        ValueError: the two have different widths.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"features of width {len(a.mean)} against statistics of width {len(b.mean)}; "
            "accepted: both from one extractor"
        )
    root = torch.linalg.svdvals(a.factor.T @ b.factor).sum()
    distance = (a.mean - b.mean).square().sum() + a.factor.square().sum() + b.factor.square().sum() - 2 * root
    return max(float(distance), 0.0)


def kernel_distance(x: Tensor, y: Tensor, seed: int = 0) -> tuple[float, float]:
    """KID (arXiv 1801.01401) of features (N, D) and (M, D): mean and standard deviation over subsets.

    There are 100 random subsets of 1000 features, or of half the smaller set. Subsets of all features would be equal
    and show no deviation.

    Raises:
        ModuleNotFoundError: torchmetrics is missing.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    subset = min(KID_SUBSET, len(x) // 2, len(y) // 2)
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(nn.Identity(), subsets=KID_SUBSETS, subset_size=subset)
        metric.update(x.double(), real=True)
        metric.update(y.double(), real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def inception_score(logits: Tensor, seed: int = 0) -> tuple[float, float]:
    """IS (arXiv 1606.03498) of logits (N, classes): mean and standard deviation over ten splits.

    Raises:
        ModuleNotFoundError: torchmetrics is missing.
    """
    from torchmetrics.image.inception import InceptionScore

    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        metric = InceptionScore(nn.Identity(), splits=IS_SPLITS)
        metric.update(logits.double())
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def precision_recall(x: Tensor, reference: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) of features (N, D) against a reference (M, D).

    Each reference point has a radius: its distance to its k-th nearest neighbour in the reference. Precision is the
    fraction of x that lies within the radius of some reference point. Recall exchanges x and the reference.
    """
    x, reference = x.double(), reference.double()
    return _covered(x, reference, k), _covered(reference, x, k)


def _covered(points: Tensor, centres: Tensor, k: int) -> float:
    radii = torch.cat([_neighbour_distance(centres, first, k) for first in range(0, len(centres), ROWS)])
    inside = [(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(ROWS)]
    return float(torch.cat(inside).double().mean())


def _neighbour_distance(centres: Tensor, first: int, k: int) -> Tensor:
    """Distance of each centre in a block to its k-th nearest other centre."""
    distance = torch.cdist(centres[first : first + ROWS], centres)
    distance.diagonal(first).fill_(torch.inf)
    return distance.kthvalue(k, dim=1).values


class _quiet(warnings.catch_warnings):
    """Hide the warning of torchmetrics that it keeps all features in memory: they are in memory anyway."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", "Metric `", UserWarning)
