"""Samples of a run for its trackers: a few images, and what the router kept of them at the last step."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from dcdit.checkpoint import Model
from dcdit.config import TrainConfig
from dcdit.data.autoencoder import create_decoder
from dcdit.models import DCDiT
from dcdit.sample.drawing import draw
from dcdit.sample.options import SamplingOptions
from dcdit.sample.sampled import Sampled
from dcdit.train.ema import EMA
from dcdit.train.losses import autocast
from dcdit.utils.modules import evaluating

if TYPE_CHECKING:
    from dcdit.utils.images import Pixels

IMAGES, STEPS = 8, 20
METHODS = {"dit": "ddim", "flow": "euler"}
"""Of each objective: the method that calls the model once a step and needs few of them."""


class SampleSheets:
    """The samples of a run, from the averaged weights: the same classes and noise each time, no dropping, no guidance.

    Args:
        model: in training.
        ema: of the model.
        class_names: of the data.
        device: of the model.
    """

    def __init__(
        self, model: Model, ema: EMA, config: TrainConfig, class_names: tuple[str, ...], device: torch.device
    ) -> None:
        self.model, self.ema, self.config, self.device = model, ema, config, device
        classes = config.model.num_classes or len(class_names)
        self.labels = torch.arange(IMAGES, device=device) % classes
        self.names = [class_names[n] if n < len(class_names) else f"class {n}" for n in self.labels.tolist()]
        self._decode = create_decoder(None, model.config.in_channels, device, {})

    def due(self, step: int) -> bool:
        """Whether samples are drawn after this step."""
        every = self.config.run.sample_every
        return every > 0 and step % every == 0

    def draw(self) -> "dict[str, Pixels]":
        """``samples``, and of a DC-DiT ``kept_tokens``: sheets (H, W, 3). Latents are shown by their first channels.

        Raises:
            FloatingPointError: a sample is not finite.
        """
        from dcdit.sample.frames import frames, to_shown  # they need Pillow, an extra

        options = SamplingOptions(self.config.run.out, METHODS[self.config.diffusion.objective], steps=STEPS)
        traced = IMAGES if isinstance(self.model, DCDiT) else 0
        with evaluating(self.model), self.ema.as_weights(), autocast(self.config.optim, self.device):
            plain = Sampled(self.model, False)
            drawn = draw(self.model, options, self.labels, None, trace=traced, progress=False, sampled=plain)
        sheets = {"samples": self._sheet(to_shown(drawn.x, self._decode))}
        if traced:
            sheets["kept_tokens"] = self._sheet(frames(drawn.traced, self._decode)[-1].kept_tokens())
        return sheets

    def _sheet(self, pixels: "Pixels") -> "Pixels":
        from dcdit.utils.images import grid

        return np.asarray(grid(pixels, IMAGES // 2, self.names))
