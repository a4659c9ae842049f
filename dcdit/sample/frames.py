"""A traced run as pictures: at each step what the model expects, the router's probability, the kept tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcdit.sample.drawing import Decoder, TracedImage
from dcdit.utils.images import Pixels, to_pixels

MOST_FRAMES = 20
"""Steps shown; of a longer run so many, evenly spaced, with the first and the last."""
KEPT, DROPPED = ((255, 165, 0), 0.5), ((0, 0, 0), 0.75)
"""Colours laid over the positions of an image that were kept, and that were not, and how much of them."""


class Frame(NamedTuple):
    """N images at one step."""

    t: float
    """Time of the step, from 1000 (noise) to 0."""
    images: Pixels
    """(N, H, W, 3): the clean images that the model expects."""
    prob: np.ndarray[Any, np.dtype[np.float32]]
    """(N, h, w): the router's probability at each position of the grid."""
    mask: np.ndarray[Any, np.dtype[np.bool_]]
    """(N, h, w): the kept tokens."""

    @property
    def kept(self) -> float:
        """The fraction of the positions that were kept."""
        return float(self.mask.mean())

    def prob_colors(self) -> Pixels:
        """(N, h, w, 3): the probability from 0 (dark blue) to 1 (yellow)."""
        from matplotlib import colormaps  # an extra

        colors: Pixels = colormaps["viridis"](self.prob, bytes=True)[..., :3]
        return colors

    def kept_tokens(self) -> Pixels:
        """(N, H, W, 3): the images, tinted where a token was kept and dark elsewhere."""
        _, height, width, _ = self.images.shape
        rows = np.arange(height) * self.mask.shape[1] // height
        columns = np.arange(width) * self.mask.shape[2] // width
        mask = self.mask[:, rows][:, :, columns, None]
        (kept, tint), (dropped, shade) = KEPT, DROPPED
        tinted = self.images * (1 - tint) + np.array(kept) * tint
        shaded = self.images * (1 - shade) + np.array(dropped) * shade
        return np.where(mask, tinted, shaded).astype(np.uint8)


def frames(traced: Sequence[TracedImage], decode: Decoder | None, most: int = MOST_FRAMES) -> list[Frame]:
    """The steps of a run as pictures.

    Args:
        traced: images of one run; one at least.
        decode: makes pixels of samples. Without it the first three latent channels are shown.
        most: frames to make; the steps are evenly spaced, with the first and the last.
    """
    times = list(traced[0].expected)
    chosen = np.linspace(0, len(times) - 1, min(most, len(times))).round().astype(int)
    shown = []
    for t in (times[i] for i in chosen):
        # A method with two calls per step reaches some times twice. The later call is at the step's own state.
        nearest = [min(reversed(image.maps), key=lambda seen, t=t: abs(seen.t - t)) for image in traced]  # type: ignore[misc]
        expected = torch.stack([image.expected[t] for image in traced])
        shown.append(
            Frame(
                t,
                to_shown(expected, decode),
                torch.stack([seen.prob for seen in nearest]).float().numpy(),
                torch.stack([seen.mask for seen in nearest]).numpy(),
            )
        )
    return shown


def to_shown(x: Tensor, decode: Decoder | None) -> Pixels:
    """Samples (N, C, H, W) as pixels (N, H, W, 3): decoded, or else their first three channels as colours."""
    return to_pixels(_latent_colors(x) if decode is None else decode(x))


def _latent_colors(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, 3, H, W) in [-1, 1]: the first channels between their extremes. The last may repeat."""
    channels = x[:, [min(i, x.shape[1] - 1) for i in range(3)]].float()
    low, high = channels.amin((1, 2, 3), keepdim=True), channels.amax((1, 2, 3), keepdim=True)
    return (channels - low) / (high - low).clamp(min=1e-6) * 2 - 1
