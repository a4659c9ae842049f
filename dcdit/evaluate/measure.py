"""The metrics of a set of images against a reference, each with its counts and with the value that real images get."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcdit.evaluate.distances import IS_SPLITS, frechet_distance, inception_score, kernel_distance, precision_recall
from dcdit.evaluate.features import Features, Statistics, extract_features
from dcdit.evaluate.images import ImageSource, holds_images, npz_arrays
from dcdit.utils.deprecation import warn_renamed
from dcdit.utils.tables import markdown_table

DIGITS = {"FID": 2, "sFID": 2, "KID": 5, "IS": 2, "precision": 3, "recall": 3}
"""Names of the metrics in the order of the table, and the decimals that it shows."""
FEWEST = IS_SPLITS
"""Images that a set needs at least: one in each split of the Inception Score."""
BIASED_BELOW = 10_000
"""With fewer images, FID says more about their number than about the images."""


@dataclass(frozen=True)
class Metric:
    """The value of one metric.

    Attributes:
        value, spread: the value, and its standard deviation: over the subsets of KID, over the splits of IS.
        count: images that were measured.
        reference_count: images that they were compared with; None for IS, and for statistics without a count.

    Example:
        >>> from dcdit.evaluate import Metric
        >>> Metric(value=12.5, count=5000, reference_count=50000).value
        12.5
    """

    value: float
    count: int
    reference_count: int | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate_images` found.

    Attributes:
        metrics: by name, of the images.
        floor: the same of real images, as many of them; empty where the reference has no images for it.
        left_out: name of a metric, or "floor", to the reason why it is missing.
        notes: what a reader should know before quoting a number.
        extractor: identity of the network, if it has one.

    Example:
        >>> from dcdit.evaluate import Evaluation, Metric
        >>> found = Evaluation({"kid": Metric(0.012, 5000, 5000)}, {"kid": Metric(0.001, 5000, 5000)}, {}, (), None)
        >>> found.metrics["kid"].value - found.floor["kid"].value > 0.01, found.left_out
        (True, {})
    """

    metrics: dict[str, Metric]
    floor: dict[str, Metric]
    left_out: dict[str, str]
    notes: tuple[str, ...]
    extractor: str | None

    @property
    def figures(self) -> dict[str, Metric]:
        """The old name of ``metrics``."""
        warn_renamed("Evaluation.figures", "Evaluation.metrics")
        return self.metrics

    def to_dict(self) -> dict[str, Any]:
        """JSON values. The metrics are called ``figures`` there, as scripts that read metrics.json expect."""
        values = asdict(self)
        return {"figures": values.pop("metrics"), **values}

    def table(self) -> str:
        """Markdown: metrics and floor with their counts, what is left out and why, and the notes."""
        columns = (self.metrics, self.floor) if self.floor else (self.metrics,)
        head = ["metric", "images", "n", "real images", "n"][: 1 + 2 * len(columns)]
        rows = [[name, *(cell for column in columns for cell in _cells(name, column[name]))] for name in self.metrics]
        missing = [f"Left out: {name}, because {reason}." for name, reason in self.left_out.items()]
        return "\n".join([markdown_table(head, rows), "", *missing, *self.notes])


def _cells(name: str, metric: Metric) -> tuple[str, str]:
    digits = DIGITS[name]
    value = f"{metric.value:.{digits}f}" + ("" if metric.spread is None else f" ± {metric.spread:.{digits}f}")
    if name == "IS":
        return value, f"{metric.count:,}"
    return value, f"{metric.count:,} vs {'?' if metric.reference_count is None else f'{metric.reference_count:,}'}"


@dataclass(frozen=True)
class ReferenceSet:
    """Real images as features, as statistics, or as both. With both, FID and sFID take the statistics, as ADM does.

    Example:
        >>> import torch
        >>> from dcdit.evaluate import Features, ReferenceSet
        >>> reference = ReferenceSet(features=Features(torch.randn(100, 4)))
        >>> reference.features.pooled.shape, reference.statistics is None
        (torch.Size([100, 4]), True)
    """

    features: Features | None = None
    statistics: Statistics | None = None


def load_reference(
    source: ImageSource | Features | Statistics | ReferenceSet, extractor: nn.Module, **options: Any
) -> ReferenceSet:
    """A reference from images, from stored statistics, or from an ``.npz`` that holds both.

    Args:
        source: images as in :func:`extract_features`, statistics, or the path of either.
        extractor, options: of :func:`extract_features`.

    Raises:
        FileNotFoundError, ValueError: nothing readable there.

    Example:
        >>> import torch
        >>> from dcdit.evaluate import load_reference
        >>> class MeanColour(torch.nn.Module):
        ...     def forward(self, images):
        ...         return images.float().mean((2, 3))
        >>> reference = load_reference(torch.full((20, 8, 8, 3), 7, dtype=torch.uint8), MeanColour(), progress=False)
        >>> reference.features.pooled[0].tolist()
        [7.0, 7.0, 7.0]
    """
    if isinstance(source, ReferenceSet):
        return source
    if isinstance(source, Statistics):
        return ReferenceSet(None, source)
    if isinstance(source, str | Path) and Path(source).suffix == ".npz" and "mu" in npz_arrays(Path(source)):
        features = extract_features(source, extractor, **options) if holds_images(Path(source)) else None
        return ReferenceSet(features, Statistics.load(source))
    return ReferenceSet(extract_features(source, extractor, **options))


def evaluate_images(
    images: ImageSource | Features,
    reference: ImageSource | Features | Statistics | ReferenceSet | None,
    extractor: nn.Module,
    *,
    num_reference: int | None = None,
    size: int | None = None,
    batch_size: int = 50,
    cache: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """FID, sFID, KID, Inception Score, precision and recall, as far as the extractor and the reference allow them.

    Every metric has a floor: its value for real images. They are as many as ``images``, drawn from the reference, and
    compared with reference images that are not among them. Where the reference has more images than ``num_reference``,
    the real ones are drawn from the rest. Then the metrics and the floor differ in nothing but the images.

    Args:
        images: what is evaluated; see :func:`dcdit.evaluate.images.open_images`, or features from
            :func:`extract_features`.
        reference: real images in the same forms, statistics, or both (:func:`load_reference`). None: IS alone.
        extractor: see :mod:`dcdit.evaluate.extractors`.
        num_reference: compare with this many of the reference's images, drawn at random. None: with all.
        size, batch_size, cache, progress: see :func:`extract_features`.
        seed: of everything drawn at random: reference images, subsets of KID, splits of IS.

    Raises:
        ValueError: fewer than 10 images, images of two sizes, an extractor that breaks its contract, or a reference
            made with another extractor.

    Example:
        >>> import torch
        >>> from dcdit.evaluate import evaluate_images
        >>> class MeanColour(torch.nn.Module):
        ...     def forward(self, images):
        ...         return images.float().mean((2, 3))
        >>> dark = torch.randint(0, 100, (20, 8, 8, 3), dtype=torch.uint8)
        >>> real = torch.randint(0, 255, (60, 8, 8, 3), dtype=torch.uint8)
        >>> found = evaluate_images(dark, real, MeanColour(), progress=False)
        >>> found.metrics["FID"].value > 10 * found.floor["FID"].value, sorted(found.left_out)
        (True, ['IS', 'sFID'])
    """
    options: dict[str, Any] = {"size": size, "batch_size": batch_size, "cache": cache, "progress": progress}
    features = extract_features(images, extractor, **options)
    _check_count("images", features)
    real = ReferenceSet() if reference is None else load_reference(reference, extractor, **options)
    _check_fit(features, real)
    pool = real.features
    if pool is None:
        if num_reference is not None:
            raise ValueError(f"num_reference is {num_reference}, but there are no reference images to draw from")
        metrics, left_out = measure(features, None, real.statistics, seed)
        return _finish(features, metrics, {}, {**left_out, "floor": _no_images(real.statistics)})

    _check_count("reference images", pool)
    if num_reference is not None and not FEWEST <= num_reference <= len(pool):
        raise ValueError(f"num_reference is {num_reference}; accepted: {FEWEST} to {len(pool)}, the reference's images")
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed), device="cpu")
    used = pool if num_reference is None else pool.rows(order[:num_reference])
    metrics, left_out = measure(features, used, real.statistics, seed)
    drawn = min(len(features), len(pool) // 2)
    if drawn < FEWEST:
        return _finish(features, metrics, {}, {**left_out, "floor": f"half of {len(pool)} real images is too few"})
    others = pool.rows(order[: min(len(used), len(pool) - drawn)])
    floor, _ = measure(pool.rows(order[len(pool) - drawn :]), others, None, seed)
    return _finish(features, metrics, {name: floor[name] for name in metrics}, left_out)


def measure(
    images: Features, reference: Features | None, statistics: Statistics | None, seed: int = 0
) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics that can be computed, and for each of the others the reason why not.

    Args:
        images: features of the images.
        reference: features of real images; without them there is no KID, precision or recall.
        statistics: of real images, for FID and sFID. None: those of ``reference``.
        seed: of subsets and splits.
    """
    metrics, left_out = dict[str, Metric](), dict[str, str]()
    n = len(images)
    gaussians = statistics or (reference.statistics if reference else None)
    if gaussians is None:
        left_out |= dict.fromkeys(("FID", "sFID"), _no_images(None))
    else:
        own = images.statistics
        metrics["FID"] = Metric(frechet_distance(own.pooled, gaussians.pooled), n, gaussians.count)
        if own.spatial is None:
            left_out["sFID"] = "the extractor gives no spatial features"
        elif gaussians.spatial is None:
            left_out["sFID"] = "the stored statistics hold no mu_s and sigma_s"
        else:
            metrics["sFID"] = Metric(frechet_distance(own.spatial, gaussians.spatial), n, gaussians.count)
    if reference is None:
        left_out |= dict.fromkeys(("KID", "precision", "recall"), _no_images(statistics))
    else:
        kid, spread = kernel_distance(images.pooled, reference.pooled, seed)
        metrics["KID"] = Metric(kid, n, len(reference), spread)
        precision, recall = precision_recall(images.pooled, reference.pooled)
        metrics["precision"] = Metric(precision, n, len(reference))
        metrics["recall"] = Metric(recall, n, len(reference))
    if images.logits is None:
        left_out["IS"] = "the extractor gives no logits"
    else:
        score, spread = inception_score(images.logits, seed)
        metrics["IS"] = Metric(score, n, None, spread)
    return {name: metrics[name] for name in DIGITS if name in metrics}, left_out


def _no_images(statistics: Statistics | None) -> str:
    return "there is no reference" if statistics is None else "stored statistics hold no images"


def _finish(
    features: Features, metrics: dict[str, Metric], floor: dict[str, Metric], left_out: dict[str, str]
) -> Evaluation:
    n, notes = len(features), []
    if "FID" in metrics and n < BIASED_BELOW:
        notes.append(
            f"Warning: n = {n:,} is below {BIASED_BELOW:,}. FID and sFID are then mostly the bias of a small sample: "
            "compare them with the column of real images, and never with another n. KID has no such bias."
        )
    if floor and (drawn := floor["KID"].count) < n:
        notes.append(f"The reference is too small for {n:,} real images of its own: that column is of {drawn:,}.")
    return Evaluation(metrics, floor, left_out, tuple(notes), features.extractor)


def _check_count(what: str, features: Features) -> None:
    if len(features) < FEWEST:
        raise ValueError(f"{len(features)} {what} are too few; accepted: at least {FEWEST}")


def _check_fit(features: Features, real: ReferenceSet) -> None:
    for other in (real.features, real.statistics):
        identities = {features.extractor, other.extractor if other else None} - {None}
        if len(identities) > 1:
            raise ValueError(
                f"features of different extractors: {' and '.join(map(str, sorted(map(str, identities))))}; "
                "accepted: one for images and reference"
            )
    sizes = [f.size for f in (features, real.features) if f is not None and f.size is not None]
    if len(set(sizes)) > 1:
        (height, width), (other_height, other_width) = sizes
        raise ValueError(
            f"the images are {width}x{height} pixels and the reference's {other_width}x{other_height}; "
            "accepted: one size"
        )
