"""Samples as pictures."""

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def to_pixels(x: Tensor) -> Pixels:
    """(B, 3, H, W) in [-1, 1], clamped, to uint8 (B, H, W, 3). FloatingPointError if it is not finite."""
    if not x.isfinite().all():
        raise FloatingPointError("an image holds numbers that are not finite, so it has no pixels")
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def grid(pixels: Pixels, columns: int, gap: int = 2) -> Image.Image:
    """(B, H, W, 3) in rows of ``columns`` images, ``gap`` white pixels between them."""
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet)
