"""Images in which the detail is in few places, and these are known: a scanned digit somewhere on an empty canvas."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dcdit.data.samples import Split

SIDE, DIGIT = 32, 16
"""Pixels per side of a canvas and of the digit on it."""
INK = 0.2
"""Share of full ink from which on a pixel counts as ink."""

Array = np.ndarray[Any, Any]


def scans_of_scikit_learn() -> Path:
    """The file of the installed scikit-learn with 1,797 scanned digits, which is found without importing it."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "error: the digits are a file of scikit-learn, which is not installed; --digits names the file"
        )
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


def write_canvases(scans_file: Path, path: Path, count: int, held_out: float) -> None:
    """Write ``count`` canvases as ``data.kind: npz`` reads them, with ``ink`` (N, H, W) bool beside them.

    The scans have 8 x 8 pixels and are enlarged to twice that. Those of the images that ``data.held_out`` holds out are
    others than those that are trained on.
    """
    rows = np.loadtxt(scans_file, delimiter=",")
    scans, labels = rows[:, :-1], rows[:, -1].astype(np.int64)
    rng = np.random.default_rng(0)
    digits = np.stack([_enlarged(scan.reshape(8, 8)) for scan in scans])
    order = rng.permutation(len(digits))
    cut = round(len(digits) * held_out)
    chosen = rng.choice(order[cut:], count)
    unseen = Split("held_out", count, held_out, 0, path).items
    chosen[unseen] = rng.choice(order[:cut], len(unseen))
    canvases = np.zeros((count, SIDE, SIDE), dtype=np.float32)
    places = rng.integers(0, SIDE - DIGIT + 1, (count, 2))
    for canvas, digit, (top, left) in zip(canvases, digits[chosen], places, strict=True):
        canvas[top : top + DIGIT, left : left + DIGIT] = digit
    images = np.repeat((255 * canvases).round().astype(np.uint8)[..., None], 3, axis=3)
    np.savez_compressed(path, images=images, labels=labels[chosen], ink=canvases > INK)


def held_out_ink(path: Path, count: int, held_out: float) -> Tensor:
    """(count, H, W) bool: where the first held-out canvases have ink."""
    with np.load(path) as arrays:
        ink = arrays["ink"]
    return torch.from_numpy(ink[Split("held_out", len(ink), held_out, 0, path).items[:count]])


def _enlarged(scan: Array) -> Array:
    """(8, 8) from 0 to 16, to (DIGIT, DIGIT) from 0 to 1."""
    image = Image.fromarray((scan / 16).astype(np.float32))
    return np.asarray(image.resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)).clip(0, 1)
