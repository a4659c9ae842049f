"""Routers: the probability that a token is hard to predict from its neighbours, (B, L, D) -> (B, L) float32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdit import ops
from dcdit.nn.autocast import without_autocast
from dcdit.nn.memory_format import to_grid


class PredictabilityRouter(nn.Module):
    """Scores how badly a 3x3 convolution predicts a token (DC-DiT, arXiv 2603.06351, the default router).

    Args:
        dim: D, a multiple of 32.
        grid: (H, W).
    """

    INITIAL_LOGIT = -1.1

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
        z = to_grid(self.proj(x), self.grid)
        # z - predictor(z) as one convolution.
        weight, bias = self.predictor.weight, self.predictor.bias
        identity = F.pad(
            torch.eye(len(weight), dtype=weight.dtype, device=weight.device)[:, :, None, None], (1, 1, 1, 1)
        )
        prediction_error = F.conv2d(z, identity - weight, -bias, padding=1)  # type: ignore[operator]
        features = self.scorer(prediction_error)
        norm, out = self.norm, self.out
        with without_autocast(x):
            return ops.boundary_prob_predictability(
                features, norm.weight, norm.bias, out.weight, out.bias, norm.num_groups, norm.eps
            )


class CosineProjections(nn.Module):
    """Query and key projections that start as the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)

    def reset_parameters(self) -> None:
        nn.init.eye_(self.query.weight)
        nn.init.eye_(self.key.weight)


class Cosine2dRouter(CosineProjections):
    """Cosine dissimilarity to the filtered neighbourhood (DC-DiT v1).

    At the start both projections are the same and a token is one of its own neighbours. So hardly any p is above one
    half, and an image keeps little more than its most probable token. The ratio loss raises p from there.

    Args:
        dim: D.
        grid: (H, W).
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
        q, k = self.query(x), self.key(x)
        with without_autocast(x):
            return ops.boundary_prob_cosine2d(q, k, self.filter.to(q.dtype), self.grid)


class Cosine1dRouter(CosineProjections):
    """Cosine dissimilarity to the previous token in raster order (H-Net, arXiv 2507.07955, section 2.2).

    Args:
        dim: D.
        grid: not used, for a sequence has no width. It is here because all routers are built with the same arguments.
    """

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__(dim)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.query(x), self.key(x)
        with without_autocast(x):
            return ops.boundary_prob_cosine(q, k)


ROUTERS: dict[str, type[nn.Module]] = {
    "predictability": PredictabilityRouter,
    "cosine2d": Cosine2dRouter,
    "cosine1d": Cosine1dRouter,
}
