"""Training compute in FLOPs: how much a run has spent, and how many steps another run needs to spend the same."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit.models import DCDiTConfig, ModelConfig, SparseDiTConfig, count_flops

FORWARD_AND_BACKWARD = 3
"""A backward pass costs two forward passes: one product for the gradient of the inputs, one for that of the weights."""


class SpentFlops:
    """Training FLOPs of a run: three times :func:`dcdit.models.count_flops` at the numbers of tokens that were kept.

    Adding does not wait for the device; reading does.

    Args:
        config: of the model.
        device: of the kept lengths.
        spent: by the earlier parts of a resumed run.
    """

    def __init__(self, config: ModelConfig, device: torch.device, spent: int = 0) -> None:
        self.spent = spent
        """FLOPs of all processes, as of the last :meth:`read`."""
        forward = _forward_by_length(config)
        # int64 is exact: between two readings even a large run spends far fewer than 2^63.
        self._per_image = torch.tensor([FORWARD_AND_BACKWARD * flops for flops in forward], device=device)
        self._unread = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, images: int, lengths: Tensor | None, passes: int = 1, others: int = 0) -> None:
        """Count forward and backward passes. What the gates of a dynamic width close is masked, so it counts.

        Args:
            images: number of images of a pass.
            lengths: (images,) integer, kept or sparse tokens of each image; None where all passes cost the same.
            passes: with these images.
            others: further FLOPs per image, e.g. of a teacher's forward pass.
        """
        once = images * self._per_image[0] if lengths is None else self._per_image[lengths.long()].sum()
        self._unread += passes * once
        self._unread += images * others

    def read(self, accelerator: Any) -> int:
        """The total over all processes. Every process has to call this."""
        self.spent += int(accelerator.gather(self._unread).sum())
        self._unread.zero_()
        return self.spent


def _forward_by_length(config: ModelConfig) -> list[int]:
    """FLOPs of an image with 0, 1, 2, ... tokens; a single number where all images cost the same."""
    if isinstance(config, DCDiTConfig):
        most = config.grid[0] * config.grid[1]
    elif isinstance(config, SparseDiTConfig):
        most = config.most_sparse_tokens
    else:
        return [count_flops(config)["total"]]
    return [0, *(count_flops(config, length)["total"] for length in range(1, most + 1))]


def matched_steps(flops: float, records: Sequence[Mapping[str, Any]]) -> int:
    """Steps after which a run has spent ``flops``, estimated from the beginning of its log.

    DC-DiT is compared with a static DiT at equal training compute (arXiv 2603.06351, appendix): its number of steps
    times its FLOPs per step equals that of the baseline. FLOPs per step are measured, because the router decides them.
    The option ``optim.flops`` stops a run at a number of FLOPs without this estimate.

    Args:
        flops: total training FLOPs, e.g. the last ``flops`` in the log of the baseline.
        records: of log.jsonl, in order. Those without ``flops`` are ignored. After the last record, a step is assumed
            to cost the mean of their second half, so the log should reach well past the steps without dropping.

    Raises:
        ValueError: no record with ``flops``.

    Example:
        >>> from dcdit.train import matched_steps
        >>> matched_steps(1000.0, [{"step": 10, "flops": 100.0}, {"step": 20, "flops": 200.0}])  # 10 FLOPs a step
        100
    """
    pairs = [(record["step"], record["flops"]) for record in records if "flops" in record]
    if not pairs:
        raise ValueError("no record has flops; accepted: the log.jsonl of a run")
    steps, spent = np.array([(0, 0), *pairs], dtype=float).T
    if flops <= spent[-1]:
        return math.ceil(np.interp(flops, spent, steps))
    middle = len(pairs) // 2
    per_step = (spent[-1] - spent[middle]) / (steps[-1] - steps[middle])
    return math.ceil(steps[-1] + (flops - spent[-1]) / per_step)
