"""The figures of a set of images against a reference, each with its counts and beside what real images would get."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcdit.evaluate.distances import IS_SPLITS, frechet_distance, inception_score, kernel_distance, precision_recall
from dcdit.evaluate.features import Features, Statistics, extract
from dcdit.evaluate.images import Source, holds_images, npz_arrays
from dcdit.utils.tables import markdown_table

DIGITS = {"FID": 2, "sFID": 2, "KID": 5, "IS": 2, "precision": 3, "recall": 3}
"""The metrics in the order of a table, and the decimals that it shows."""
FEWEST = IS_SPLITS
"""Images that a set needs: one in each split of the Inception Score."""
BIASED_BELOW = 10_000
"""Images below which FID says more about their number than about them."""


@dataclass(frozen=True)
class Figure:
    """One metric.

    Attributes:
        value, spread: the figure, and its standard deviation: over the subsets of KID, over the splits of IS.
        count: images it is of.
        reference_count: images they are compared with; None for IS, and for statistics that do not say.
    """

    value: float
    count: int
    reference_count: int | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate_images` found.

    Attributes:
        figures: metric to figure, of the images.
        floor: the same of real images, as many of them; empty where the reference has no images for it.
        left_out: metric, or "floor", to the reason why it is missing.
        notes: what a reader should know before quoting a figure.
        extractor: identity of the network, if it has one.
    """

    figures: dict[str, Figure]
    floor: dict[str, Figure]
    left_out: dict[str, str]
    notes: tuple[str, ...]
    extractor: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def table(self) -> str:
        """Markdown: figures and floor with their counts, what is left out and why, and the notes."""
        columns = (self.figures, self.floor) if self.floor else (self.figures,)
        head = ["metric", "images", "n", "real images", "n"][: 1 + 2 * len(columns)]
        rows = [
            [metric, *(cell for column in columns for cell in _cells(metric, column[metric]))]
            for metric in self.figures
        ]
        missing = [f"Left out: {metric}, because {reason}." for metric, reason in self.left_out.items()]
        return "\n".join([markdown_table(head, rows), "", *missing, *self.notes])


def _cells(metric: str, figure: Figure) -> tuple[str, str]:
    digits = DIGITS[metric]
    value = f"{figure.value:.{digits}f}" + ("" if figure.spread is None else f" ± {figure.spread:.{digits}f}")
    if metric == "IS":
        return value, f"{figure.count:,}"
    return value, f"{figure.count:,} vs {'?' if figure.reference_count is None else f'{figure.reference_count:,}'}"


@dataclass(frozen=True)
class Reference:
    """Real images as features, as statistics, or as both: then FID and sFID take the statistics, as ADM does."""

    features: Features | None = None
    statistics: Statistics | None = None


def load_reference(
    source: Source | Features | Statistics | Reference, extractor: nn.Module, **options: Any
) -> Reference:
    """A reference from images, from stored statistics, or from an ``.npz`` that holds both.

    Args:
        source: images as in :func:`extract`, statistics, or the path of either.
        options: of :func:`extract`.

    Raises:
        FileNotFoundError, ValueError: nothing readable there.
    """
    if isinstance(source, Reference):
        return source
    if isinstance(source, Statistics):
        return Reference(None, source)
    if isinstance(source, str | Path) and Path(source).suffix == ".npz" and "mu" in npz_arrays(Path(source)):
        features = extract(source, extractor, **options) if holds_images(Path(source)) else None
        return Reference(features, Statistics.load(source))
    return Reference(extract(source, extractor, **options))


def evaluate_images(
    images: Source | Features,
    reference: Source | Features | Statistics | Reference | None,
    extractor: nn.Module,
    *,
    num_reference: int | None = None,
    size: int | None = None,
    batch_size: int = 50,
    cache: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """FID, sFID, KID, Inception Score, precision and recall, as far as the extractor and the reference serve them.

    Beside every figure stands that of real images: as many as there are ``images``, drawn from the reference, against
    reference images that are not among them. Where the reference has more images than ``num_reference``, the drawn ones
    come from the rest, so that the two columns differ in nothing but the images.

    Args:
        images: what is evaluated; see :func:`dcdit.evaluate.images.open_images`, or features from :func:`extract`.
        reference: real images in the same forms, statistics, or both (:func:`load_reference`). None: IS alone.
        extractor: see :mod:`dcdit.evaluate.extractors`.
        num_reference: compare with this many of the reference's images, drawn at random. None: with all.
        size, batch_size, cache, progress: see :func:`extract`.
        seed: of everything drawn at random: reference images, subsets of KID, splits of IS.

    Raises:
        ValueError: fewer than 10 images, images of two sizes, an extractor that breaks its contract, or a reference
            made with another extractor.
    """
    options: dict[str, Any] = {"size": size, "batch_size": batch_size, "cache": cache, "progress": progress}
    features = extract(images, extractor, **options)
    _check_count("images", features)
    real = Reference() if reference is None else load_reference(reference, extractor, **options)
    _check_fit(features, real)
    pool = real.features
    if pool is None:
        if num_reference is not None:
            raise ValueError(f"num_reference is {num_reference}, but there are no reference images to draw from")
        figures, left_out = measure(features, None, real.statistics, seed)
        return _finish(features, figures, {}, {**left_out, "floor": _no_images(real.statistics)})

    _check_count("reference images", pool)
    if num_reference is not None and not FEWEST <= num_reference <= len(pool):
        raise ValueError(f"num_reference is {num_reference}; accepted: {FEWEST} to {len(pool)}, the reference's images")
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    used = pool if num_reference is None else pool.rows(order[:num_reference])
    figures, left_out = measure(features, used, real.statistics, seed)
    drawn = min(len(features), len(pool) // 2)
    if drawn < FEWEST:
        return _finish(features, figures, {}, {**left_out, "floor": f"half of {len(pool)} real images is too few"})
    others = pool.rows(order[: min(len(used), len(pool) - drawn)])
    floor, _ = measure(pool.rows(order[len(pool) - drawn :]), others, None, seed)
    return _finish(features, figures, {metric: floor[metric] for metric in figures}, left_out)


def measure(
    images: Features, reference: Features | None, statistics: Statistics | None, seed: int = 0
) -> tuple[dict[str, Figure], dict[str, str]]:
    """The figures that can be had, and the reason why not for each of the others.

    Args:
        reference: features of real images; without them there is no KID, precision or recall.
        statistics: of real images, for FID and sFID. None: those of ``reference``.
    """
    figures, left_out = dict[str, Figure](), dict[str, str]()
    n = len(images)
    gaussians = statistics or (reference.statistics if reference else None)
    if gaussians is None:
        left_out |= dict.fromkeys(("FID", "sFID"), _no_images(None))
    else:
        own = images.statistics
        figures["FID"] = Figure(frechet_distance(own.pooled, gaussians.pooled), n, gaussians.count)
        if own.spatial is None:
            left_out["sFID"] = "the extractor gives no spatial features"
        elif gaussians.spatial is None:
            left_out["sFID"] = "the stored statistics hold no mu_s and sigma_s"
        else:
            figures["sFID"] = Figure(frechet_distance(own.spatial, gaussians.spatial), n, gaussians.count)
    if reference is None:
        left_out |= dict.fromkeys(("KID", "precision", "recall"), _no_images(statistics))
    else:
        kid, spread = kernel_distance(images.pooled, reference.pooled, seed)
        figures["KID"] = Figure(kid, n, len(reference), spread)
        for metric, share in zip(
            ("precision", "recall"), precision_recall(images.pooled, reference.pooled), strict=True
        ):
            figures[metric] = Figure(share, n, len(reference))
    if images.logits is None:
        left_out["IS"] = "the extractor gives no logits"
    else:
        score, spread = inception_score(images.logits, seed)
        figures["IS"] = Figure(score, n, None, spread)
    return {metric: figures[metric] for metric in DIGITS if metric in figures}, left_out


def _no_images(statistics: Statistics | None) -> str:
    return "there is no reference" if statistics is None else "stored statistics hold no images"


def _finish(
    features: Features, figures: dict[str, Figure], floor: dict[str, Figure], left_out: dict[str, str]
) -> Evaluation:
    n, notes = len(features), []
    if "FID" in figures and n < BIASED_BELOW:
        notes.append(
            f"Warning: n = {n:,} is below {BIASED_BELOW:,}. FID and sFID are then mostly the bias of a small sample: "
            "compare them with the column of real images, and with nothing of another n. KID has no such bias."
        )
    if floor and (drawn := floor["KID"].count) < n:
        notes.append(f"The reference is too small for {n:,} real images of its own: that column is of {drawn:,}.")
    return Evaluation(figures, floor, left_out, tuple(notes), features.extractor)


def _check_count(what: str, features: Features) -> None:
    if len(features) < FEWEST:
        raise ValueError(f"{len(features)} {what} are too few; accepted: at least {FEWEST}")


def _check_fit(features: Features, real: Reference) -> None:
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
