"""What an evaluation leaves behind: metrics.json, report.md and a picture of the first images."""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dcdit.evaluate.distances import IS_SPLITS, KID_SUBSET, KID_SUBSETS, NEIGHBOURS
from dcdit.evaluate.generate import Settings, Work
from dcdit.evaluate.images import ImageSet
from dcdit.evaluate.measure import Evaluation
from dcdit.utils.files import atomically
from dcdit.utils.images import grid

SHOWN, COLUMNS = 64, 16
"""Images in the picture."""
PACKAGES = ("torch", "torchmetrics", "numpy")
METHOD = f"""n is images vs reference images. "Real images" are as many images of the reference as were evaluated,
against reference images that are not among them: what a perfect model would get. KID: {KID_SUBSETS} random subsets of
{KID_SUBSET}, or of half the smaller set; ± is the deviation over the subsets. IS: {IS_SPLITS} splits. Precision and
recall: k = {NEIGHBOURS}. sFID: the first 7 channels of the spatial features."""


def write_report(
    out: Path,
    images: ImageSet,
    reference: str | None,
    evaluation: Evaluation | None,
    sampling: tuple[Settings, Work] | None,
) -> str:
    """Write the three files into ``out``; the text is what the terminal shows."""
    facts: dict[str, Any] = {
        "images": images.name,
        "count": images.count,
        "reference": reference,
        **(evaluation.to_dict() if evaluation else {}),
        "sampling": {**asdict(sampling[0]), **asdict(sampling[1])} if sampling else None,
        "versions": {package: version(package) for package in PACKAGES},
    }
    text = "\n\n".join(
        [
            *(
                [f"{images.count:,} images of {images.name} against {reference}", evaluation.table()]
                if evaluation
                else []
            ),
            *([_work(*sampling)] if sampling else []),
        ]
    )
    page = "\n\n".join(
        [
            "# Evaluation",
            text,
            *([METHOD, f"Extractor: {evaluation.extractor or 'without identity'}."] if evaluation else []),
            f"The first {min(SHOWN, images.count)} images:\n\n![images](images.png)\n",
        ]
    )
    atomically(out / "metrics.json", lambda file: file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8"))
    atomically(out / "report.md", lambda file: file.write_text(page, encoding="utf-8"))
    grid(next(images.batches(SHOWN)), COLUMNS).save(out / "images.png")
    return text


def _work(settings: Settings, work: Work) -> str:
    """The FLOPs in words."""
    budget = settings.drop if settings.budget is None else f"budget {settings.budget}"
    kept = "" if work.kept is None else f", {budget}, {work.kept:.1%} of the positions kept"
    null = "" if not work.tflops_null else f", {work.tflops_null:.4g} of them for the unconditional branch"
    return (
        f"Sampling: {settings.num:,} images, {settings.steps} steps of {settings.method}, guidance "
        f"{settings.cfg_scale:g}{kept}: {work.tflops:.4g} TFLOPs per image (2 per multiply-add){null}."
    )
