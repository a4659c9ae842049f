"""Handwritten digits inside the scikit-learn package. Read from disk, never downloaded."""

import numpy as np
from torch import Tensor

from dcdit.data.samples import Samples, Split, to_sample

INK = 16
"""The value of full ink in a scan."""
MARGIN = 1
"""Empty pixels around a scan, whose ink touches its edges."""


class Digits(Samples):
    """1,797 scans of digits by 43 people (Alpaydin and Kaynak 1998, the test set of UCI's "Optical Recognition").

    A scan has 8x8 pixels. It gets a margin of one and is enlarged with a bicubic filter, so every detail of an image
    lies along the strokes.

    Args:
        size: pixels per side of an image; a multiple of 10 enlarges every pixel alike.
        split: ``"train"`` or ``"held_out"``.
        held_out: fraction of the scans that is held out.
        seed: sample n is a pure function of (seed, n).

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
        ValueError: a bad argument.

    Example:
        >>> from dcdit.data import Digits
        >>> dataset = Digits(size=20, split="held_out")
        >>> x, label = dataset[0]
        >>> x.shape, dataset.class_names[label], x.min().item()  # the background is black
        (torch.Size([3, 20, 20]), '2', -1.0)
    """

    def __init__(self, size: int = 20, split: str = "train", held_out: float = 0.1, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"size is {size}; accepted: a whole number of at least 1")
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ModuleNotFoundError("the digits are data of scikit-learn: pip install 'dcdit[demo]'") from None
        scans = load_digits()
        self.shape = (3, size, size)
        self.class_names = tuple(str(name) for name in scans.target_names)
        self.labels = scans.target
        self.scans = np.rint(np.pad(scans.images, ((0, 0), *[(MARGIN, MARGIN)] * 2)) * 255 / INK).astype(np.uint8)
        self.split = Split(split, len(self.scans), held_out, seed, "scikit-learn's digits")

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        from dcdit.utils.pillow import Image

        item, side = self.split.item(n), self.shape[1]
        image = Image.fromarray(self.scans[item]).resize((side, side), Image.Resampling.BICUBIC)
        return to_sample(np.repeat(np.asarray(image)[..., None], 3, axis=-1)), int(self.labels[item])
