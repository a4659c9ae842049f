"""A transformer of diffusers, called as the samplers of this package call a model."""

from typing import Any

import torch
from torch import Tensor

BRANCHES = ("cond", "uncond")
"""Names that the pipelines of diffusers give to the branches of guidance."""


class Denoiser:
    """``(x, t, y, **options) -> sample`` of a transformer.

    Without a cache, both branches of guidance are one call. With a cache each is a call of its own, in a context of its
    own, so that each leaves out blocks by what changes in it.

    Args:
        transformer: of :mod:`dcdit.integrations.diffusers`.
        images: rows of a branch.
    """

    def __init__(self, transformer: Any, images: int) -> None:
        self._transformer, self._images = transformer, images

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, **options: Any) -> Tensor:
        if not self._transformer.is_cache_enabled:
            return self._transformer(x, t, y, **options).sample
        rho = options.pop("drop_fraction", None)
        outputs = []
        for name, first in zip(BRANCHES, range(0, len(x), self._images), strict=False):
            rows = slice(first, first + self._images)
            own = {} if rho is None else {"drop_fraction": rho[rows] if isinstance(rho, Tensor) else rho}
            with self._transformer.cache_context(name):
                outputs.append(self._transformer(x[rows], t[rows], y[rows], **options, **own).sample)
        return torch.cat(outputs)
