"""Routers: the probability that a token is hard to predict from its neighbours, (B, L, D) -> (B, L) float32.

One of them keeps a regular grid instead and reads nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdit import ops
from dcdit.nn.cells import SIDE, cell_means, cells_of, spread
from dcdit.nn.identity import set_to_identity
from dcdit.nn.memory_format import to_grid, to_tokens
from dcdit.nn.plain import is_plain, is_plain_conv3x3
from dcdit.ops.autocast import without_autocast
from dcdit.ops.numerics import upcast
from dcdit.utils.modules import dtype_of


class PredictabilityRouter(nn.Module):
    """Scores how badly a 3x3 convolution predicts a token (DC-DiT, arXiv 2603.06351, the default router).

    Args:
        dim: D, a multiple of 32.
        grid: (H, W).

    Example:
        >>> import torch
        >>> from dcdit.nn import PredictabilityRouter
        >>> router = PredictabilityRouter(32, grid=(2, 3))
        >>> p = router(torch.randn(1, 6, 32))
        >>> p[0, 0].item(), p[0, -1].item(), bool(((p > 0) & (p <= 1)).all())  # the first and the last are forced
        (1.0, 1.0, True)
    """

    INITIAL_LOGIT = -1.1
    SHARPNESS = 1.0
    """How much logit(p) grows with the score."""

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        width = dim // 4
        self.proj = nn.Linear(dim, width)
        self.predictor = nn.Conv2d(width, width, 3, padding=1)
        self.scorer = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.scorer(self.prediction_error(to_grid(self.proj(x), self.grid)))
        with without_autocast(x):
            return self.probability(features)

    def prediction_error(self, z: Tensor) -> Tensor:
        """``z - predictor(z)``, as one convolution where the predictor is plain."""
        if not is_plain_conv3x3(self.predictor):
            return z - self.predictor(z)
        weight, bias = self.predictor.weight, self.predictor.bias
        identity = F.pad(
            torch.eye(len(weight), dtype=weight.dtype, device=weight.device)[:, :, None, None], (1, 1, 1, 1)
        )
        return F.conv2d(z, identity - weight, -bias, padding=1)  # type: ignore[operator]

    @property
    def has_plain_tail(self) -> bool:
        """Whether norm and projection are what they were built as, so that functions may take their place."""
        norm, out = self.norm, self.out
        return is_plain(norm, nn.GroupNorm) and norm.affine and is_plain(out, nn.Linear) and out.bias is not None

    def probability(self, features: Tensor) -> Tensor:
        """Group norm, SiLU, projection and sigmoid, as one operation where the modules are plain."""
        norm, out = self.norm, self.out
        if self.has_plain_tail:
            return ops.boundary_prob_predictability(
                features, norm.weight, norm.bias, out.weight, out.bias, norm.num_groups, norm.eps
            )
        return with_forced_ends(torch.sigmoid(self.score(features)))

    def score(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H*W) before the sigmoid, in float32.

        Modules that are not plain are called, and compute in the dtype of their weights.
        """
        norm, out = self.norm, self.out
        if self.has_plain_tail:
            hidden = ops.group_norm_silu(upcast(features), norm.num_groups, norm.weight, norm.bias, eps=norm.eps)
            return F.linear(to_tokens(hidden), upcast(out.weight), upcast(out.bias)).squeeze(2)
        hidden = F.silu(norm(features.to(dtype_of(norm))))
        return upcast(out(to_tokens(hidden).to(dtype_of(out)))).squeeze(2)


def with_forced_ends(p: Tensor) -> Tensor:
    """(B, L) with 1 for the first and the last position, which are always kept."""
    position = torch.arange(p.shape[1], device=p.device)
    return p.masked_fill((position == 0) | (position == p.shape[1] - 1), 1.0)


class DitheredRouter(PredictabilityRouter):
    """Learns how many positions each cell of 4 x 4 keeps; an ordered dither (Bayer 1973) says which, evenly spaced.

    :class:`PredictabilityRouter` scores the means of the cells. With s, the score of a position's cell before the
    sigmoid, and t = (k + 1/2) / 16, where k is the entry of the position in a 4 x 4 Bayer matrix,
    ``p = sigmoid(4 (s - logit(t)))``. So a cell keeps a share of about sigmoid(s) of its positions. Training starts at
    about a quarter, which is every second position of every second row. The scores take a sixteenth of the FLOPs.

    Args:
        dim: D, a multiple of 32.
        grid: (H, W). Cells at its end may be smaller.

    Example:
        >>> import torch
        >>> from dcdit.nn import DitheredRouter
        >>> router = DitheredRouter(32, grid=(4, 8))
        >>> _ = torch.nn.init.zeros_(router.out.weight), torch.nn.init.constant_(router.out.bias, -0.5)
        >>> (router(torch.randn(1, 32, 32)) > 0.5).int().view(4, 8)[:, :4].tolist()  # a share of 0.38: 6 of 16
        [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    """

    SHARPNESS = 4.0
    """As above. The de-chunk smooths what has a p near one half, so a model learns to push p to 0 or 1. At 1 that
    drives the shares of the cells apart, wherever the image; at 4 it does so less, and the loss is lower."""

    def forward(self, x: Tensor) -> Tensor:
        means = self.proj(to_tokens(cell_means(x, self.grid)))
        features = self.scorer(self.prediction_error(to_grid(means, cells_of(self.grid))))
        with without_autocast(x):
            logits = spread(self.score(features), self.grid)
            logits = logits - torch.logit(dither_thresholds(self.grid, logits))
            return with_forced_ends(torch.sigmoid(self.SHARPNESS * logits))


class CosineProjections(nn.Module):
    """Query and key projections that start as the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)

    def reset_parameters(self) -> None:
        set_to_identity(self.query.weight)
        set_to_identity(self.key.weight)


class Cosine2dRouter(CosineProjections):
    """Cosine dissimilarity to the filtered neighbourhood (DC-DiT v1).

    At the start both projections are the same and a token is one of its own neighbours. So hardly any p is above one
    half, and an image keeps little more than its most probable token. The ratio loss raises p from there.

    Args:
        dim: D.
        grid: (H, W).

    Example:
        >>> import torch
        >>> from dcdit.nn import Cosine2dRouter
        >>> router = Cosine2dRouter(2, grid=(3, 3))
        >>> round(router(torch.ones(1, 9, 2))[0, 4].item(), 4)  # the middle of nine equal tokens
        0.0
    """

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__(dim)
        self.grid = grid
        self.filter = nn.Parameter(torch.empty(dim, 3, 3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.filter, 1 / 9)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        return ops.boundary_prob_cosine2d(q, self.key(x), self.filter.to(q.dtype), self.grid)


class Cosine1dRouter(CosineProjections):
    """Cosine dissimilarity to the previous token in raster order (H-Net, arXiv 2507.07955, section 2.2).

    Args:
        dim: D.
        grid: not used, for a sequence has no width. It is here because all routers are built with the same arguments.

    Example:
        >>> import torch
        >>> from dcdit.nn import Cosine1dRouter
        >>> router = Cosine1dRouter(2, grid=(1, 3))  # its projections start as the identity
        >>> router(torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])).tolist()
        [[1.0, 0.0, 1.0]]
    """

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__(dim)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return ops.boundary_prob_cosine(self.query(x), self.key(x))


class UniformRouter(nn.Module):
    """A regular quarter of the positions, whatever the image: a baseline that a learned router should beat.

    It keeps every second position of every second row. Dropping thins that out evenly, and a budget above a quarter
    fills it up evenly (an ordered dither, Bayer 1973): for every power of two of the positions the grid is regular. It
    has no weights, and the ratio loss, which is then a constant, cannot move it from a quarter.

    Args:
        dim: not used. It is here because all routers are built with the same arguments.
        grid: (H, W).

    Example:
        >>> import torch
        >>> from dcdit.nn import UniformRouter
        >>> p = UniformRouter(32, grid=(4, 4))(torch.randn(1, 16, 32))
        >>> (p > 0.5).int().view(4, 4).tolist()
        [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
        >>> p.topk(2).indices.tolist()  # at half of that: (0, 0) and (2, 2)
        [[0, 10]]
    """

    SHARE = 0.25
    KEPT = (0.95, 0.85)
    """The first and about the last probability of the kept positions: the de-chunk smooths them little."""

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        row, column = (torch.arange(side, device=x.device) for side in self.grid)
        order = dither_order(row[:, None], column, max(self.grid)).flatten()
        order = order.to(torch.promote_types(x.dtype, torch.float32))
        first, last = self.KEPT
        kept = first - (first - last) * order / self.SHARE
        return torch.where(order < self.SHARE, kept, (1 - order) / 2).repeat(len(x), 1)


def dither_order(row: Tensor, column: Tensor, side: int) -> Tensor:
    """Place of each position in a Bayer matrix of at least ``side`` squared entries, float32 in [0, 1)."""
    order, bits = torch.zeros_like(row + column), (side - 1).bit_length()
    for bit in range(bits):  # the lowest bits, which tell neighbours apart, weigh most
        order = 4 * order + 2 * ((row ^ column) >> bit & 1) + (row >> bit & 1)
    return order.float() / 4**bits


def dither_thresholds(grid: tuple[int, int], like: Tensor) -> Tensor:
    """(H*W,): the entry of each position in a Bayer matrix of a cell's size, in steps of 1/16 from 1/32 on."""
    row, column = (torch.arange(side, device=like.device) % SIDE for side in grid)
    return dither_order(row[:, None], column, SIDE).flatten().to(like.dtype) + 1 / (2 * SIDE**2)


ROUTERS: dict[str, type[nn.Module]] = {
    "predictability": PredictabilityRouter,
    "dithered": DitheredRouter,
    "cosine2d": Cosine2dRouter,
    "cosine1d": Cosine1dRouter,
    "uniform": UniformRouter,
}
"""Names of ``DCDiTConfig.router`` to the classes."""
