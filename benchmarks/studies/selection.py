"""Other choices of the tokens, and other contents of them, for runs of `benchmarks/studies/equal_compute.py`.

Instead of what a router learns: a random quarter of the positions, a regular quarter, or the quarter with the most
detail in the clean image (which no sampler could know). And another content of a kept token: the mean of the encoder's
tokens in its cell (the positions that the de-chunk gives to it) through a linear layer is added to it, so that no pixel
goes unread.

Three rules between learned and fixed: a sixteenth of the positions in a regular grid is always kept and the rest is
learned; of each cell of 2 x 2 the most probable position is kept; and p is taken as a share and dithered. And a learned
choice whose gradient ends at the router's input.

Five changes on the way of the pixels to a token and back: a norm with one scale per image, group norms of more
channels, a patch embedding of the pixels of a token's cell, the noisy image added to the output, and a de-chunk that
tells a position where it lies from the kept token whose content it gets.

Beside them a regular quarter that is shifted at random, the package's own regular quarter (`router: uniform`), which
differs in what is dropped first, and one whose probabilities are hardly above one half, so that the de-chunk smooths it
by almost half. All but the package's own routers replace parts of the model in the processes of the study.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from einops import rearrange
from torch import Tensor, nn

from benchmarks.studies import cifar10
from dcdit.checkpoint.model import ARCHITECTURES
from dcdit.diffusion import objectives
from dcdit.models import DCDiTConfig, dc_dit, presets
from dcdit.nn import (
    ROUTERS,
    ChunkLayer,
    ContextChunkLayer,
    ConvBlock,
    ConvStack,
    DitheredRouter,
    PredictabilityRouter,
    SpatialDeChunk,
)
from dcdit.nn.cells import SIDE, spread
from dcdit.nn.memory_format import to_tokens
from dcdit.nn.routers import dither_thresholds
from dcdit.ops import TokenSelection
from dcdit.ops._torch.nearest import nearest_kept
from dcdit.profiling.router_study import local_detail

SHARE = 0.25
"""Of the positions that a fixed choice keeps."""
KEPT, DROPPED = (0.95, 0.85), 0.1
"""Probabilities that a fixed choice gives: from its best to its last position, and of the others. The de-chunk reads
them, and dropping takes the lowest first."""
LEAST_TIME = 0.05
"""Below it, a clean image that is predicted weighs no more in the loss."""


class Variant(NamedTuple):
    """One line of the study."""

    router: str = "predictability"
    cell: bool = False
    """Whether a kept token also reads the mean of the positions to which it is the nearest one."""
    clean: bool = False
    """Whether the model predicts the clean image, and the velocity is computed from it and the noisy one."""
    time: str = "uniform"
    """How :class:`FlowMatchingObjective` draws its times."""
    rule: str | None = None
    """What is done with the learned router, of RULES."""
    image_norm: bool = False
    """Whether the norm at the end of the encoder has one scale per image, instead of one per position."""
    groups: int = ConvBlock.GROUPS
    """Of the group norms in encoder and decoder. The models of the study have 32 channels there: one per group."""
    patches: bool = False
    """Whether a kept token reads the pixels of its cell of 4 x 4, in place of the mean of what the encoder made."""
    input_skip: bool = False
    """Whether the noisy image is added to the output, with a gain that the conditioning gives."""
    offsets: bool = False
    """Whether a position gets more than the content of its nearest kept token: what its offset from it makes of it."""

    @property
    def replaces_parts(self) -> bool:
        """Whether the model has other parts than the package's."""
        return self != Variant(self.router, clean=self.clean, time=self.time) or self.router in FIXED


def lattice(grid: tuple[int, int], step: int, device: torch.device) -> Tensor:
    """(H*W,) bool: every ``step``-th position of every ``step``-th row."""
    rows, cols = (torch.arange(side, device=device) % step == 0 for side in grid)
    return (rows[:, None] & cols).flatten()


class FixedRouter(nn.Module):
    """A choice without weights: subclasses score the positions, and the best quarter is kept."""

    kept = KEPT

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid

    def score(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x)
        best = score.topk(round(SHARE * score.shape[1]), dim=1).indices
        kept = torch.linspace(*self.kept, best.shape[1], device=score.device)
        return torch.full_like(score, DROPPED).scatter(1, best, kept.expand_as(best))


class RandomRouter(FixedRouter):
    def score(self, x: Tensor) -> Tensor:
        return torch.rand(x.shape[:2], device=x.device)


class RegularRouter(FixedRouter):
    """Every second position of every second row. Which of these are dropped first is chance."""

    def score(self, x: Tensor) -> Tensor:
        return lattice(self.grid, 2, x.device).float() + torch.rand(x.shape[:2], device=x.device)


class ShiftedRegularRouter(FixedRouter):
    """The regular quarter, for each image and call at one of its four places: regular, and every position is used."""

    def score(self, x: Tensor) -> Tensor:
        row, col = torch.randint(2, (2, len(x), 1), device=x.device)
        rows, cols = (torch.arange(side, device=x.device) % 2 for side in self.grid)
        kept = (rows == row)[:, :, None] & (cols == col)[:, None]
        return kept.float().flatten(1) + torch.rand(x.shape[:2], device=x.device)


class SmoothedRegularRouter(RegularRouter):
    kept = (0.55, 0.51)


class OracleRouter(FixedRouter):
    """Where the clean image has the most detail. The objective, which adds the noise, tells which image that is."""

    clean: Tensor

    def score(self, x: Tensor) -> Tensor:
        return local_detail(OracleRouter.clean).flatten(1)


class GridRouter(PredictabilityRouter):
    """Every fourth position of every fourth row is kept, whatever p says there."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(lattice(self.grid, 4, x.device), KEPT[0])


class CellRouter(PredictabilityRouter):
    """The position with the highest p of each 2 x 2 cell. Learned: where in a cell, and which cells drop first."""

    def forward(self, x: Tensor) -> Tensor:
        p = super().forward(x)
        rows, cols = self.grid[0] // 2, self.grid[1] // 2
        cells = rearrange(p, "b (r i c j) -> b (r c) (i j)", r=rows, i=2, c=cols, j=2)
        best = torch.zeros_like(cells).scatter(2, cells.argmax(2, keepdim=True), 1).bool()
        kept = rearrange(best, "b (r c) (i j) -> b (r i c j)", r=rows, i=2, c=cols, j=2)
        return torch.where(kept, (1 + p) / 2, p / 2)


class DetachedRouter(PredictabilityRouter):
    """The router learns, and what it learns from does not reach the encoder."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class DetachedGridRouter(GridRouter, DetachedRouter):
    """Both."""


class DitheredPositionsRouter(PredictabilityRouter):
    """The dither of the package's DitheredRouter, with a share for each position instead of each cell."""

    def forward(self, x: Tensor) -> Tensor:
        p = super().forward(x)
        return (p.logit(1e-6) - dither_thresholds(self.grid, p).logit()).sigmoid()


class SoftDitheredRouter(DitheredRouter):
    """p follows the share of the cell."""

    SHARPNESS = 1.0


class BoundedDitheredRouter(SoftDitheredRouter):
    """The odds of a cell's share stay within a factor of BOUND of those of a quarter."""

    BOUND = 3.0

    def score(self, features: Tensor) -> Tensor:
        bound = math.log(self.BOUND)
        return self.INITIAL_LOGIT + bound * torch.tanh((super().score(features) - self.INITIAL_LOGIT) / bound)


RULES = {
    "soft": SoftDitheredRouter,
    "bounded": BoundedDitheredRouter,
    "dithered-positions": DitheredPositionsRouter,
    "grid": GridRouter,
    "one-per-cell": CellRouter,
    "detached": DetachedRouter,
    "grid+detached": DetachedGridRouter,
}


class NotingObjective(objectives.FlowMatchingObjective):
    """Leaves the clean images where the oracle finds them."""

    def noise(self, x0: Tensor, *args: Any) -> Any:
        OracleRouter.clean = x0
        return super().noise(x0, *args)


FIXED = {
    "random": RandomRouter,
    "regular": RegularRouter,
    "regular-shifted": ShiftedRegularRouter,
    "regular-smoothed": SmoothedRegularRouter,
    "oracle": OracleRouter,
}


class CleanImageObjective(NotingObjective):
    """The first C channels of the output are the clean image; the loss is that of the velocity which follows from it.

    The velocity holds each pixel's own noise. Here the model need not carry it: it is what the image leaves of x_t.
    """

    def loss(self, out: Tensor, noisy: objectives.NoisyBatch) -> dict[str, Tensor]:
        x0 = noisy.x0
        time = (noisy.time / 1000).clamp(min=LEAST_TIME).view(-1, 1, 1, 1)
        mse = ((out[:, : x0.shape[1]].to(x0.dtype) - x0) / time).square().flatten(1).mean(1)
        return {"loss": mse, "mse": mse, "t": noisy.time}


class CellChunk(ChunkLayer):
    """Adds to each kept token what a linear layer makes of the mean over its cell."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cell_proj = nn.Linear(dim, dim)

    def pack(self, x: Tensor, sel: TokenSelection, position: Tensor | None = None) -> Tensor:
        return super().pack(x, sel, position) + self.cell_proj(cell_means(x, sel))


def cell_means(x: Tensor, sel: TokenSelection) -> Tensor:
    """(B, L, D) -> (T, D): for each kept token the mean over the positions to which it is the nearest one."""
    images, length, dim = x.shape
    side = math.isqrt(length)
    nearest = nearest_kept(sel.mask.view(images, side, side)).flatten(1)
    rows = sel.packed_rows.gather(1, nearest).flatten().long()
    sums = x.new_zeros(len(sel.indices), dim, dtype=torch.float32).index_add(0, rows, x.flatten(0, 1).float())
    return sums / rows.bincount(minlength=len(sums))[:, None]


class ImageNorm(nn.Module):
    """RMSNorm with the mean square of the whole image (B, L, D): what a position has more of than others, it keeps."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean((1, 2), keepdim=True) + 1e-5).rsqrt() * self.weight


class ImageNormStack(ConvStack):
    """An encoder that ends in an ImageNorm. A decoder, which becomes narrower, stays as it is."""

    def __init__(self, widths: tuple[int, ...], cond_dim: int) -> None:
        super().__init__(widths, cond_dim)
        if widths[0] < widths[-1]:
            self.norm = ImageNorm(widths[-1])


class SkipDCDiT(dc_dit.DCDiT):
    """Adds the noisy image to the output, with a gain per channel that a linear layer makes of the conditioning."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.input_gain = nn.Linear(config.hidden_size, config.in_channels)
        nn.init.zeros_(self.input_gain.weight)
        nn.init.zeros_(self.input_gain.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *args: Any, **options: Any) -> Any:
        out = super().forward(x, t, y, *args, **options)
        gain = self.input_gain(nn.functional.silu(self.t_embedder(t) + self.y_embedder(y)))
        skipped = gain[:, :, None, None] * x
        return (out[0] + skipped, *out[1:]) if isinstance(out, tuple) else out + skipped


class PatchChunk(ContextChunkLayer):
    """Adds to each kept token a linear patch embedding of its cell of 4 x 4 pixels, which PatchDCDiT puts here."""

    pixels: Tensor

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__(dim, grid)
        self.proj = nn.Conv2d(cifar10.COMMON["in_channels"], dim, SIDE, stride=SIDE)  # type: ignore[assignment]

    def pack(self, x: Tensor, sel: TokenSelection, position: Tensor | None = None) -> Tensor:
        x = x + spread(to_tokens(self.proj(self.pixels)), self.grid)
        return ChunkLayer.pack(self, x, sel, position)


class PatchDCDiT(dc_dit.DCDiT):
    """Shows its input to the chunk layer."""

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> dc_dit.Embedded:
        self.chunk.pixels = x
        return super().embed(x, t, y)


class OffsetDeChunk(SpatialDeChunk):
    """Adds to each position what its offset from its nearest kept token makes of the content h of that token.

    The de-chunk alone gives the same content to all positions around a kept token, and the convolutions that follow
    cannot tell them apart. A patch of a static DiT has other weights for each of its pixels. Added is
    ``vector[offset] + up(factor[offset] * down(h))``, whose product has rank RANK.
    """

    RANK, REACH = 64, 2
    """Offsets further away than REACH count as this far, in rows and in columns."""

    def __init__(self, dim: int, grid: tuple[int, int], sigma: float) -> None:
        super().__init__(grid, sigma)
        offsets = (2 * self.REACH + 1) ** 2
        self.vectors = nn.Parameter(torch.zeros(offsets, dim))
        self.factors = nn.Parameter(torch.zeros(offsets, self.RANK))
        self.down, self.up = nn.Linear(dim, self.RANK, bias=False), nn.Linear(self.RANK, dim, bias=False)

    def offsets(self, nearest: Tensor) -> Tensor:
        """(B, H, W) raster indices of the nearest kept positions -> (B, H*W) numbers of the offsets."""
        height, width = self.grid
        rows = torch.arange(height, device=nearest.device)[:, None] - nearest // width
        cols = torch.arange(width, device=nearest.device) - nearest % width
        rows, cols = (steps.clamp(-self.REACH, self.REACH) + self.REACH for steps in (rows, cols))
        return (rows * (2 * self.REACH + 1) + cols).flatten(1)

    def forward(self, h: Tensor, p: Tensor, sel: TokenSelection, residual: Tensor) -> Tensor:
        nearest = nearest_kept(sel.mask.view(-1, *self.grid))
        offsets, token = self.offsets(nearest), sel.packed_rows.gather(1, nearest.flatten(1)).long()
        content = nn.functional.embedding(token, self.down(h)) * nn.functional.embedding(offsets, self.factors)
        added = nn.functional.embedding(offsets, self.vectors) + self.up(content)
        return super().forward(h, p, sel, residual + added)


@contextmanager
def installed(variant: Variant) -> Iterator[None]:
    """Inside, models are built and trained as the variant says."""
    dim = cifar10.MODELS["dc-dit"][1]["hidden_size"]
    chunk = partial(CellChunk, dim) if variant.cell else ChunkLayer
    dechunk = partial(OffsetDeChunk, dim) if variant.offsets else SpatialDeChunk
    model = SkipDCDiT if variant.input_skip else PatchDCDiT if variant.patches else dc_dit.DCDiT
    learned = {} if variant.rule is None else {variant.router: RULES[variant.rule]}
    objective = partial(CleanImageObjective if variant.clean else NotingObjective, variant.time)
    with (
        patch.dict(ROUTERS, {**FIXED, **learned}),
        patch.object(objectives, "FlowMatchingObjective", objective),
        patch.object(dc_dit, "ChunkLayer", chunk),
        patch.object(dc_dit, "SpatialDeChunk", dechunk),
        patch.object(ConvBlock, "GROUPS", variant.groups),
        patch.object(dc_dit, "ConvStack", ImageNormStack if variant.image_norm else ConvStack),
        patch.object(dc_dit, "ContextChunkLayer", PatchChunk if variant.patches else ContextChunkLayer),
        patch.object(presets, "DCDiT", model),
        patch.dict(ARCHITECTURES, {"DCDiT": (model, DCDiTConfig)}),
    ):
        yield
