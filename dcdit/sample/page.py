"""A sampling run as one HTML file: a slider over the steps, one over the budgets. It needs no network and no server."""

import base64
import io
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from dcdit.sample.frames import DROPPED, KEPT, Frame
from dcdit.utils.files import write_text
from dcdit.utils.images import Pixels
from dcdit.utils.pillow import Image

PIXEL_ART = 64
"""Images up to so many pixels high are stored without loss."""


def write_page(
    path: Path, facts: dict[str, Any], frames: Sequence[Sequence[Frame]], names: Sequence[str], title: str
) -> None:
    """Write the page.

    Args:
        path: of the file, ``.html``.
        facts: what samples.json holds, with the same ``runs`` as ``frames``.
        frames: of each run, see :func:`dcdit.sample.frames.frames`.
        names: of the images in a frame.
        title: the settings that all runs have in common, in a line.
    """
    runs = [_run(run, shown) for run, shown in zip(facts["runs"], frames, strict=True)]
    data = {"title": title, "names": list(names), "runs": runs}
    # "<" may not stand in a script: "</script>" would end it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = resources.files("dcdit.sample").joinpath("page.html").read_text(encoding="utf-8")
    write_text(path, template.replace("DATA", text, 1))


def _run(run: dict[str, Any], frames: Sequence[Frame]) -> dict[str, Any]:
    names = ("kept", "natural", "tflops_per_image", "seconds_per_image")
    calls = [[call["t"] / 1000, call["kept"], call["natural"]] for call in run["calls"]]
    numbers = {name: run[name] for name in names}
    name = run["name"].replace("_", " ")
    return {"name": name, **numbers, "calls": calls, "frames": [_frame(frame) for frame in frames]}


def _frame(frame: Frame) -> dict[str, Any]:
    kept = [round(float(mask.mean()), 4) for mask in frame.mask]
    pictures = {"images": _photographs(frame.images), "prob": _photographs(frame.prob_colors())}
    return {"t": frame.t / 1000, "kept": kept, **pictures, "overlay": _overlay(frame)}


def _photographs(pictures: Pixels) -> str:
    """Pictures side by side as a data URL."""
    opaque = np.full((*pictures.shape[:3], 1), 255, dtype=np.uint8)
    row = _side_by_side(np.concatenate((pictures, opaque), axis=3))
    return _url(Image.fromarray(row), "webp", lossless=row.shape[0] <= PIXEL_ART, quality=85)


def _overlay(frame: Frame) -> str:
    """What makes :meth:`Frame.kept_tokens` of the images when it is laid over them: three colours, one transparent."""
    colors = [((0, 0, 0), 0.0), DROPPED, KEPT]
    picture = Image.fromarray(_side_by_side(1 + frame.mask.astype(np.uint8)), mode="P")
    picture.putpalette([level for color, _ in colors for level in color])
    return _url(picture, "png", bits=2, transparency=bytes(round(255 * alpha) for _, alpha in colors))


def _side_by_side(pictures: Pixels) -> Pixels:
    """(N, H, W, ...) to (H, N (W + gap) - gap, ...), zeros between them."""
    gap = [(0, 0)] * pictures.ndim
    gap[2] = (0, max(1, pictures.shape[2] // 32))
    row = np.concatenate(list(np.pad(pictures, gap)), axis=1)
    return row[:, : -gap[2][1]]


def _url(picture: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
