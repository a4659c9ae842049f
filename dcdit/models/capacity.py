"""How many rows a packed buffer of a static size needs: what a batch keeps and its spread, up to the edge of a wave.

A capacity (see :func:`dcdit.ops.select_tokens`) is chosen before it is known what the router keeps. Too small a one
drops tokens, too large a one costs time. It must hold the mean of what a batch keeps and some standard deviations more.

A GPU computes a matrix product in tiles, as many at a time as it has multiprocessors: a wave. The products of a block
take the same time for all row counts with the same number of waves. So the capacity is the last such row count.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import torch

from dcdit.kernels import launch
from dcdit.models.config import DCDiTConfig

TILE = (128, 256)
"""Rows and columns of the output that one multiprocessor computes in a large half-precision product on recent GPUs."""

QUERY_ROWS = 128
"""Queries of a program of the attention kernels: a bound on the length of an image is a multiple of it."""


@dataclass(frozen=True)
class KeptShare:
    """Which share of its positions a router keeps of an image, before anything is dropped.

    :func:`dcdit.sample.measure_kept_share` measures it. ``save_model`` stores that of ``model.kept_share`` with the
    weights.

    Example:
        >>> from dcdit.models import KeptShare
        >>> KeptShare.of_calls([[0.2, 0.1], [0.3, 0.5]])  # two calls for two images; the second call kept more
        KeptShare(mean=0.4, std=0.1414213562373095, largest=0.5, images=2)
    """

    mean: float
    std: float
    """Standard deviation over images."""
    largest: float
    """Of one image."""
    images: int
    """How many were measured, at least 2."""

    def __post_init__(self) -> None:
        values = (self.mean, self.std, self.largest)
        if not (all(0 <= value <= 1 for value in values) and self.mean <= self.largest and self.images >= 2):
            raise ValueError(
                f"{self} is no share; accepted: mean, std and largest in [0, 1], mean <= largest, and images >= 2"
            )

    @classmethod
    def of_calls(cls, calls: Sequence[Sequence[float]]) -> "KeptShare":
        """From the shares that each call of the model kept of its images: those of the call that kept most.

        A router keeps more at some times than at others. All images of a batch are at the same time, so the worst time
        counts, not the mean.

        Raises:
            ValueError: no call, or one image only, whose spread nobody knows.
        """
        most = max(calls, key=fmean, default=())
        if len(most) < 2:
            raise ValueError(f"shares of {len(most)} images; accepted: at least 2, for a spread")
        return cls(min(fmean(most), max(most)), stdev(most), max(most), len(most))


class Capacity(NamedTuple):
    """Static sizes for a batch: ``model(x, t, y, capacity=plan.capacity, max_seqlen=plan.max_seqlen)``.

    Example:
        >>> from dcdit.models import KeptShare, create_config, plan_capacity
        >>> share = KeptShare(mean=0.25, std=0.0, largest=0.25, images=100)
        >>> plan = plan_capacity(create_config("DC-DiT-S"), 4, share)  # 4 images of 1024 positions
        >>> plan.capacity, plan.max_seqlen
        (1024, 256)
    """

    capacity: int
    """Rows of the packed buffer."""
    max_seqlen: int
    """Most tokens of one image."""
    overflow_probability: float
    """That a call drops a token because of one of the two, as far as what images keep is normally distributed."""


def plan_capacity(
    config: DCDiTConfig,
    batch: int,
    share: KeptShare,
    drop_fraction: float | Sequence[float] = 0.0,
    *,
    multiprocessors: int | None = None,
    tile: tuple[int, int] = TILE,
    sigmas: float = 3.0,
) -> Capacity:
    """The static sizes that a batch needs.

    The spread is that of the sum over the batch, and of its mean over ``share.images`` images. Below one wave nothing
    is rounded but to whole tiles: the libraries then take smaller tiles.

    Args:
        config: of the model; its widths give the products of a block.
        batch: images per call (with guidance, twice the samples).
        share: what the router keeps of an image.
        drop_fraction: rho, one number or one per image. For fractions that change with time the smallest.
        multiprocessors: of the GPU, see :func:`multiprocessors_of`. None rounds nothing: a CPU has no waves.
        tile: rows and columns of a tile of a product.
        sigmas: standard deviations above the mean.

    Raises:
        ValueError: a value out of range.

    Example, DC-DiT-XL on an H100 with 132 multiprocessors: a quarter of 32 images fits 66 tiles of rows.

        >>> from dcdit.models import KeptShare, create_config, plan_capacity
        >>> share = KeptShare(mean=0.245, std=0.02, largest=0.31, images=1000)
        >>> plan_capacity(create_config("DC-DiT-XL"), 32, share, multiprocessors=132)[:2]
        (8448, 384)
    """
    fractions = [float(drop_fraction)] * batch if isinstance(drop_fraction, float | int) else list(drop_fraction)
    if batch < 1 or len(fractions) != batch:
        raise ValueError(f"batch is {batch} with {len(fractions)} drop fractions; accepted: at least 1, one for each")
    if not all(0 <= rho < 1 for rho in fractions):
        raise ValueError(f"drop_fraction is {drop_fraction}; accepted: numbers in [0, 1)")
    if not 0 < sigmas <= 8:
        raise ValueError(f"sigmas is {sigmas}; accepted: above 0, at most 8")
    positions = math.prod(config.grid)
    # The number of dropped tokens is rounded down, on average by half a token.
    stay = [1 - rho for rho in fractions]
    mean = positions * share.mean * sum(stay) + 0.5 * sum(rho > 0 for rho in fractions)
    std = positions * share.std * math.sqrt(sum(part**2 for part in stay) + sum(stay) ** 2 / share.images)
    rows = min(max(math.ceil(mean + sigmas * std), batch), batch * positions)
    if multiprocessors is not None:
        rows = min(last_row_of_waves(config, rows, multiprocessors, tile), batch * positions)

    # As likely as the batch is to overflow, one of its images is too long.
    each = -NormalDist().inv_cdf(_tail(sigmas) / batch)
    most, image_std = max(stay), positions * share.std * math.sqrt(1 + 1 / share.images)
    longest = most * max(positions * share.mean + each * image_std, positions * share.largest)
    max_seqlen = min(QUERY_ROWS * math.ceil(max(longest, 1) / QUERY_ROWS), positions)

    too_many = 0.0 if rows == batch * positions else _tail_above(rows, mean, std)
    too_long = 0.0
    if max_seqlen < positions:
        too_long = sum(_tail_above(max_seqlen, part * positions * share.mean, part * image_std) for part in stay)
    return Capacity(rows, max_seqlen, min(too_many + too_long, 1.0))


def multiprocessors_of(device: torch.device) -> int | None:
    """How many a GPU has, None for a CPU."""
    return launch.multiprocessors(device) if device.type == "cuda" else None


def last_row_of_waves(config: DCDiTConfig, rows: int, multiprocessors: int, tile: tuple[int, int]) -> int:
    """The most rows, in whole tiles, for which no product of a block takes more waves than for ``rows``."""
    dim, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    tiles_down = math.ceil(rows / tile[0])
    tiles_across = [math.ceil(width / tile[1]) for width in (3 * dim, dim, hidden)]
    if tiles_down * max(tiles_across) <= multiprocessors:
        return tiles_down * tile[0]
    waves = [math.ceil(tiles_down * across / multiprocessors) for across in tiles_across]
    return tile[0] * min(wave * multiprocessors // across for wave, across in zip(waves, tiles_across, strict=True))


def _tail(sigmas: float) -> float:
    """Probability that a normal number is so many standard deviations above its mean."""
    return 0.5 * math.erfc(sigmas / math.sqrt(2))


def _tail_above(size: int, mean: float, std: float) -> float:
    return _tail((size - mean) / std) if std > 0 else float(size < mean)
