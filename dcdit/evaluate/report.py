"""The files that an evaluation writes: metrics.json, report.md and a picture of the first images."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dcdit.evaluate.distances import IS_SPLITS, KID_SUBSET, KID_SUBSETS, NEIGHBOURS
from dcdit.evaluate.features import SPATIAL_CHANNELS
from dcdit.evaluate.generate import SampleSettings, SamplingCost
from dcdit.evaluate.images import ImageSet
from dcdit.evaluate.measure import Evaluation
from dcdit.utils.environment import package_versions
from dcdit.utils.files import atomically, write_text
from dcdit.utils.images import grid

METRICS, REPORT, PICTURE = "metrics.json", "report.md", "images.png"
METRICS_KEYS = ("images", "count", "reference", "sampling", "versions")
"""By which metrics.json is known as one of this package."""
SHOWN, COLUMNS = 64, 16
"""Images in the picture."""
PACKAGES = ("torch", "torchmetrics", "numpy")
METHOD = f"""n is images vs reference images. "Real images" are as many images of the reference as were evaluated,
against reference images that are not among them: a perfect model would get these numbers. KID: {KID_SUBSETS} random
subsets of {KID_SUBSET}, or of half the smaller set; ± is the standard deviation over the subsets. IS: {IS_SPLITS}
splits. Precision and recall: k = {NEIGHBOURS}. sFID: the first {SPATIAL_CHANNELS} channels of the spatial features."""


def write_report(
    out: Path,
    images: ImageSet,
    reference: str | None,
    evaluation: Evaluation | None,
    sampling: tuple[SampleSettings, SamplingCost] | None,
) -> str:
    """Write the three files into ``out``.

    Args:
        out: an existing folder, or one to make.
        images: what was evaluated.
        reference: where the real images are, if any.
        evaluation: of the images, if there was an extractor.
        sampling: how the images were drawn and what that took, if they were.

    Returns:
        The text for the terminal.
    """
    facts: dict[str, Any] = {
        "images": images.name,
        "count": images.count,
        "reference": reference,
        **(evaluation.to_dict() if evaluation else {}),
        "sampling": {**sampling[0].to_dict(), **asdict(sampling[1])} if sampling else None,
        "versions": package_versions(PACKAGES),
    }
    results, method = [], []
    if evaluation:
        results += [f"{images.count:,} images of {images.name} against {reference}", evaluation.table()]
        method += [METHOD, f"Extractor: {evaluation.extractor or 'without identity'}."]
    if sampling:
        results.append(_cost_line(*sampling))
    text = "\n\n".join(results)
    shown = next(images.batches(SHOWN))
    pictures = f"The first {len(shown)} images:\n\n![images]({PICTURE})\n"
    page = "\n\n".join(["# Evaluation", text, *method, pictures])
    write_text(out / METRICS, json.dumps(facts, indent=2) + "\n")
    write_text(out / REPORT, page)
    atomically(out / PICTURE, grid(shown, COLUMNS).save)
    return text


def _cost_line(settings: SampleSettings, cost: SamplingCost) -> str:
    """The FLOPs in words."""
    options = settings.options
    budget = settings.drop if options.budget is None else f"budget {options.budget}"
    kept = "" if cost.kept is None else f", {budget}, {cost.kept:.1%} of the positions kept"
    lost = "" if cost.overflow is None else f", {cost.overflow:.4g} tokens per image lost to the capacity"
    null = "" if not cost.tflops_null else f", {cost.tflops_null:.4g} of them for the unconditional branch"
    return (
        f"Sampling: {settings.num:,} images, {options.steps} steps of {options.method}, guidance "
        f"{options.cfg_scale:g}{kept}{lost}: {cost.tflops:.4g} TFLOPs per image (2 per multiply-add){null}."
    )
