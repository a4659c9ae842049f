"""A feature extractor small enough for tests, and images of several distributions."""

import numpy as np
import torch
from torch import Tensor, nn


class TinyExtractor(nn.Module):
    """All three kinds of features from one convolution with random weights."""

    def __init__(self, identity: str | None = "tiny", kinds: tuple[str, ...] = ("pooled", "logits", "spatial")) -> None:
        super().__init__()
        self.identity, self.kinds = identity, kinds
        self.images_seen = 0
        rng = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 12, 3, stride=2)
        self.linear = nn.Linear(12, 10, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=rng)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        self.images_seen += len(images)
        x = self.conv(images.float() / 128 - 1).relu()
        pooled = x.mean((2, 3))
        every = {"pooled": pooled, "logits": 4 * self.linear(pooled), "spatial": x[:, :, :2, :3]}
        return {kind: every[kind] for kind in self.kinds}


def images(count: int, seed: int = 0, power: float = 1.0, size: int = 8) -> np.ndarray:
    """uint8 (count, size, size, 3); each power gives another distribution."""
    values = np.random.default_rng(seed).random((count, size, size, 3))
    return (255 * values**power).round().astype(np.uint8)
