"""Samples as pictures."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dcdit.utils.pillow import Image, ImageDraw, ImageFont

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
READABLE, LARGEST = 128, 2048
"""Pixels: the width that small images of a sheet are enlarged to, and the side of the sheet that this does not pass."""
TEXT, FEWEST_FOR_TEXT = 12, 48
"""Height of the names in a sheet, and the width of an image that a name fits under. Pixels."""


def to_pixels(x: Tensor) -> Pixels:
    """(B, 3, H, W) in [-1, 1], clamped, to uint8 (B, H, W, 3). FloatingPointError if it is not finite."""
    if not x.isfinite().all():
        raise FloatingPointError("an image holds numbers that are not finite, so it has no pixels")
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image with (width, height) pixels. Enlarged, its pixels stay visible; made smaller, they are averaged."""
    larger = size[0] >= image.width
    return image.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


def fitting(text: str, width: float, font: Font) -> str:
    """The text, cut where it is wider than so many pixels."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text


def grid(
    pixels: Pixels, columns: int, names: Sequence[str] = (), row_names: Sequence[str] = (), gap: int = 4
) -> Image.Image:
    """A sheet of images. Small ones are enlarged by a whole factor, as far as the sheet stays within 2048 pixels.

    Args:
        pixels: (B, H, W, 3).
        columns: images in a row.
        names: one for each image, written below it, where the image is wide enough for text. Without names there is no
            room for them.
        row_names: one for each row, written on its left.
        gap: white pixels between images.
    """
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    scale = max(1, min(READABLE // width, LARGEST // (columns * (width + gap)), LARGEST // (rows * (height + gap))))
    height, width = scale * height, scale * width
    text = TEXT + 4 if len(names) and width >= FEWEST_FOR_TEXT else 0
    font = ImageFont.load_default(TEXT)
    margin = math.ceil(max(font.getlength(name) for name in row_names)) + 2 * gap if row_names else 0
    size = (margin + columns * (width + gap) - gap, rows * (height + text + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(row_names):
        draw.text((gap, row * (height + text + gap) + height / 2), name, "#1a1a1a", font, anchor="lm")
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + text + gap), margin + i % columns * (width + gap)
        sheet.paste(resized(Image.fromarray(image), (width, height)), (left, top))
        if text:
            place = (left + width / 2, top + height + text / 2)
            draw.text(place, fitting(names[i], width, font), "#1a1a1a", font, anchor="mm")
    return sheet
