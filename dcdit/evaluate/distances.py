"""Distances between sets of features: numbers from arrays, without images."""

import math
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
ROUNDING = 1e-5
"""Of a covariance that somebody computed in float32: how far it may be from symmetric, and its eigenvalues below zero,
relative to its largest entry and eigenvalue."""
SAME = 1e-12
"""Squared distances below this, relative to the squared length of the features, are rounding of float64."""


@dataclass(frozen=True)
class Gaussian:
    """A mean and a factor of a covariance, float64.

    Attributes:
        mean: (D,).
        factor: (D, r), with covariance = factor @ factor.T. Few images make a thin factor and a cheap distance.

    Raises:
        ValueError: numbers that are not finite, or so large that their squares are not.
    """

    mean: Tensor
    factor: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("mean", self.mean), ("covariance", self.factor)):
            _check_finite(tensor, name)

    @classmethod
    def fit(cls, x: Tensor) -> "Gaussian":
        """The Gaussian of features (N, D), N at least 2; the covariance divides by N - 1.

        Raises:
            ValueError: another shape, or features that are not finite.
        """
        x = _checked(x, at_least=2)
        mean = x.mean(0)
        centred = (x - mean) / (len(x) - 1) ** 0.5
        if len(x) <= x.shape[1]:
            return cls(mean, centred.T)
        return cls.of(mean, centred.T @ centred)

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, names: tuple[str, str] = ("mean", "covariance")) -> "Gaussian":
        """From a mean (D,) and a covariance (D, D). Directions of no variance, to rounding, are left out.

        Args:
            names: what errors call the two.

        Raises:
            ValueError: other shapes, numbers that are not finite, or a covariance that is not symmetric or has negative
                eigenvalues, which no set of features has.
        """
        mean, covariance = mean.double(), covariance.double()
        if mean.dim() != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
            shapes = f"{names[0]} has shape {tuple(mean.shape)} and {names[1]} {tuple(covariance.shape)}"
            raise ValueError(f"{shapes}; accepted: (D,) and (D, D)")
        _check_finite(mean, names[0])
        _check_finite(covariance, names[1])
        asymmetry, largest = (covariance - covariance.T).abs().max(), covariance.abs().max()
        if asymmetry > ROUNDING * largest:
            raise ValueError(f"{names[1]} is not symmetric: entries differ by {asymmetry:.3g} of {largest:.3g}")
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        if values[0] < -ROUNDING * values[-1]:
            raise ValueError(f"{names[1]} has the eigenvalue {values[0]:.3g}; accepted: none below zero")
        kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
        return cls(mean, vectors[:, kept] * values[kept].sqrt())

    def covariance(self) -> Tensor:
        """(D, D)."""
        return self.factor @ self.factor.T


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)) for the covariances A and B (FID: arXiv 1706.08500).

    With A = F F' and B = G G', the trace of the root is the sum of the singular values of F' G. This needs no root of a
    singular product and is exact where few images leave most directions empty. It also takes stored statistics, which
    torchmetrics does not.

    Raises:
        ValueError: the two have different widths, or numbers that are not finite or too large.
    """
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"features of width {len(a.mean)} against statistics of width {len(b.mean)}; "
            "accepted: both from one extractor"
        )
    root = torch.linalg.svdvals(a.factor.T @ b.factor).sum()
    distance = (a.mean - b.mean).square().sum() + a.factor.square().sum() + b.factor.square().sum() - 2 * root
    return max(_finite(float(distance), "Fréchet distance"), 0.0)


def kernel_distance(x: Tensor, y: Tensor, seed: int = 0) -> tuple[float, float]:
    """KID (arXiv 1801.01401) of features (N, D) and (M, D): mean and standard deviation over subsets.

    There are 100 random subsets of 1000 features, or of half the smaller set. Subsets of all features would be equal
    and show no deviation.

    Raises:
        ModuleNotFoundError: torchmetrics is missing.
        ValueError: fewer than four features in a set, or numbers that are not finite.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = (_checked(features, at_least=4) for features in (x, y))
    subset = min(KID_SUBSET, len(x) // 2, len(y) // 2)
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(nn.Identity(), subsets=KID_SUBSETS, subset_size=subset)
        metric.update(x, real=True)
        metric.update(y, real=False)
        mean, deviation = metric.compute()
    return _finite(float(mean), "KID"), float(deviation)


def inception_score(logits: Tensor, seed: int = 0) -> tuple[float, float]:
    """IS (arXiv 1606.03498) of logits (N, classes): mean and standard deviation over ten splits.

    Raises:
        ModuleNotFoundError: torchmetrics is missing.
        ValueError: fewer logits than splits, or numbers that are not finite.
    """
    from torchmetrics.image.inception import InceptionScore

    logits = _checked(logits, at_least=IS_SPLITS)
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        metric = InceptionScore(nn.Identity(), splits=IS_SPLITS)
        metric.update(logits)
        mean, deviation = metric.compute()
    return _finite(float(mean), "IS"), float(deviation)


def precision_recall(x: Tensor, reference: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) of features (N, D) against a reference (M, D).

    Each reference point has a radius: its distance to its k-th nearest neighbour in the reference. Precision is the
    fraction of x that lies within the radius of some reference point. Recall exchanges x and the reference.

    Raises:
        ValueError: not more than k features in a set, or numbers that are not finite.
    """
    x, reference = (_checked(features, at_least=k + 1) for features in (x, reference))
    return _covered(x, reference, k), _covered(reference, x, k)


def _covered(points: Tensor, centres: Tensor, k: int) -> float:
    radii = torch.cat([_neighbour_distance(centres, first, k) for first in range(0, len(centres), ROWS)])
    # The same image k + 1 times has the radius 0, and its distance to itself is rounding.
    radii = (radii.square() + SAME * centres.square().sum(1)).sqrt()
    inside = [(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(ROWS)]
    return float(torch.cat(inside).double().mean())


def _neighbour_distance(centres: Tensor, first: int, k: int) -> Tensor:
    """Distance of each centre in a block to its k-th nearest other centre."""
    distance = torch.cdist(centres[first : first + ROWS], centres)
    distance.diagonal(first).fill_(torch.inf)
    return distance.kthvalue(k, dim=1).values


def _checked(features: Tensor, at_least: int) -> Tensor:
    """Features in float64. ValueError unless they are finite, (N, D), and at least so many."""
    if features.dim() != 2 or len(features) < at_least or not features.shape[1]:
        raise ValueError(f"features of shape {tuple(features.shape)}; accepted: (N, D) with N at least {at_least}")
    features = features.double()
    _check_finite(features, "features")
    return features


def _check_finite(tensor: Tensor, name: str) -> None:
    """ValueError for numbers that are not finite, or so large that the sum of their squares is not."""
    if not tensor.square().sum().isfinite():
        wrong = int((~tensor.isfinite()).sum())
        raise ValueError(f"{name}: {f'not finite in {wrong} of {tensor.numel()} places' if wrong else 'too large'}")


def _finite(value: float, name: str) -> float:
    """The value itself. ValueError if numbers were too large, or not finite, for it to be one."""
    if not math.isfinite(value):
        raise ValueError(f"the {name} is {value}: the features or statistics are not finite, or too large")
    return value


class _quiet(warnings.catch_warnings):
    """Hide the warning of torchmetrics that it keeps all features in memory: they are in memory anyway."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", "Metric `", UserWarning)
