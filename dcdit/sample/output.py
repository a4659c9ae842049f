"""The files that ``dcdit sample`` writes: pictures or latents, and the contents of samples.json."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit.checkpoint import Model
from dcdit.models import DCDiT
from dcdit.sample.drawing import Decoder, DrawnImages
from dcdit.sample.model_calls import CallRecord, tflops_per_image
from dcdit.sample.options import SamplingOptions
from dcdit.sample.plan import Plan
from dcdit.utils.environment import device_name
from dcdit.utils.files import atomically
from dcdit.utils.outputs import check_own

RECORD, RECORD_KEYS = "samples.json", ("checkpoint", "model", "labels", "runs")
"""What a call of ``dcdit sample`` drew, and the keys by which the file is known as one of this package."""
REPORT, PAGE, CURVES = "report.md", "report.html", "sampling.png"
MAPS, ANIMATION = "maps_{}.png", "steps_{}.webp"
"""Files of the report; the last two are one for each set of images."""
TRACED = 6
"""Images that the report follows through the run."""
SHARES = ("kept", "natural", "heads", "groups", "tokens", "sparse")
"""Numbers of a model's calls whose means are part of samples.json."""


def check_folder(folder: Path, plans: Sequence[Plan], individual: bool, report: bool) -> None:
    """ValueError if files that ``dcdit sample`` writes are there already and are of somebody else."""
    suffixes = (".png", ".npz", "") if individual else (".png", ".npz")
    names = [f"{plan.name}{suffix}" for plan in plans for suffix in suffixes]
    if report:
        names += [REPORT, PAGE, CURVES, *(file.format(plan.name) for plan in plans for file in (MAPS, ANIMATION))]
    check_own(folder, RECORD, RECORD_KEYS, names)


def label_names(labels: Sequence[int], class_names: Sequence[str]) -> list[str]:
    """What to write beside images of these classes: the names that the checkpoint holds, or the numbers."""
    return [class_names[label] if label < len(class_names) else f"class {label}" for label in labels]


def describe(
    options: SamplingOptions, model: Model, labels: Tensor, class_names: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """The head of samples.json: what all sets of images have in common. ``runs`` is empty."""
    return {
        "checkpoint": options.checkpoint,
        "model": {"architecture": type(model).__name__, **model.config.to_dict()},
        "method": options.method,
        "steps": options.steps,
        "cfg_scale": options.cfg_scale,
        "cfg_interval": options.cfg_interval,
        "null_drop_fraction": options.null_drop_fraction,
        "seed": options.seed,
        "precision": options.precision,
        "budget": options.budget,
        "capacity": options.capacity,
        "kept_share": asdict(model.kept_share) if isinstance(model, DCDiT) and model.kept_share else None,
        "batch_size": options.batch_size,
        "device": device_name(device),
        "labels": labels.tolist(),
        "class_names": list(class_names),
        "runs": [],
    }


def describe_run(plan: Plan, drawn: DrawnImages, seconds: float, files: list[Path]) -> dict[str, Any]:
    """An entry of ``runs``: one set of images, what it kept and what it took.

    Args:
        seconds: that drawing took, without decoding.
        files: that hold the images, see :func:`write_images`.
    """
    return {
        "name": plan.name,
        **plan.summary,
        "files": [str(file) for file in files],
        **{name: _mean(drawn.calls, name) for name in SHARES if name in drawn.calls[0]},
        **({} if drawn.overflow is None else {"overflow": drawn.overflow}),
        "tflops_per_image": tflops_per_image(drawn.calls),
        "seconds": seconds,
        "seconds_per_image": seconds / len(drawn.x),
        "calls": drawn.calls,
    }


def write_images(
    folder: Path,
    name: str,
    x: Tensor,
    labels: Tensor,
    decode: Decoder | None,
    *,
    class_names: Sequence[str] = (),
    batch_size: int,
    columns: int | None = None,
    individual: bool = False,
) -> list[Path]:
    """Write a set of samples into ``folder``.

    Args:
        name: stem of the files.
        x: (N, C, H, W) samples. labels: (N,) classes, on the CPU.
        decode: makes pixels of samples. Without it latents are written, as an ``.npz`` with ``latents`` and ``labels``.
        class_names: of the model's labels, for the sheet; empty where nobody said them.
        batch_size: images to decode at a time.
        columns: of the sheet; None makes it about square.
        individual: also write every image as a file of its own.

    Returns:
        The files written, the sheet first.
    """
    if decode is None:
        file = folder / f"{name}.npz"
        arrays: dict[str, Any] = {"latents": x.float().cpu().numpy(), "labels": labels.numpy()}
        atomically(file, lambda target: np.savez(target, **arrays))
        return [file]
    # Pillow is an extra, and latents do not need it.
    from dcdit.utils.images import grid, to_pixels
    from dcdit.utils.pillow import Image

    pixels = to_pixels(torch.cat([decode(batch) for batch in x.split(batch_size)]))
    files = [folder / f"{name}.png"]
    names = label_names(labels.tolist(), class_names)
    atomically(files[0], grid(pixels, columns or math.ceil(len(pixels) ** 0.5), names).save)
    if individual:
        for index, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            files.append(folder / name / f"{index:05d}_class{label}.png")
            atomically(files[-1], Image.fromarray(image).save, clean=False)
    return files


def _mean(calls: list[CallRecord], name: str) -> float:
    return sum(call[name] for call in calls) / len(calls)
