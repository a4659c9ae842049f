"""One forward pass of a model as a graph. In a DC-DiT, a fixed budget or a capacity makes every shape static.

Which tokens are kept still changes from replay to replay.
"""

from typing import Any

import torch
from torch import Tensor

from dcdit.graphs.safety import FixedModel, graph_obstacle
from dcdit.models import DCDiT, DiT, DyDiT, SparseDiT
from dcdit.utils import cuda


class GraphedDenoiser:
    """One captured forward pass of a model. It is called like the model, so :func:`dcdit.diffusion.sample` takes it.

    It keeps the model alive. What it forbids stands in :mod:`dcdit.graphs`.

    Args:
        model: a DC-DiT or static DiT in evaluation mode on a CUDA device.
        batch: images per call, always exactly that many (with guidance, twice the samples).
        budget: tokens kept per image. A DC-DiT needs either this or ``capacity``.
        capacity: static size of the packed buffer for the whole batch. Tokens beyond it are dropped, lowest p first,
            and counted in :attr:`overflow`.
        warmup: eager forward passes before the capture. They compile kernels and fill caches.
        pool: of another graph, to share its memory: ``other.pool``.
        max_seqlen: most tokens of one image, with a capacity: attention then starts no programs for longer ones
            (:func:`dcdit.models.plan_capacity` gives both).

    Raises:
        ValueError: the model cannot be captured (:func:`dcdit.graphs.graph_obstacle`), or not one of budget and
            capacity is given.
        CaptureError: the capture failed; ``__cause__`` says why.

    Example:
        >>> from dcdit.graphs import GraphedDenoiser
        >>> from dcdit.models import create_model
        >>> model = create_model("DC-DiT-S", grid=(4, 4), hidden_size=128, depth=1, num_heads=2).eval()
        >>> GraphedDenoiser(model, batch=8, budget=4)  # on a GPU: with model.cuda(), then called like the model
        Traceback (most recent call last):
            ...
        ValueError: the model is on cpu; CUDA graphs need a CUDA device
    """

    def __init__(
        self,
        model: DCDiT | DiT | DyDiT | SparseDiT,
        batch: int,
        budget: int | None = None,
        capacity: int | None = None,
        warmup: int = 3,
        pool: cuda.Pool | None = None,
        max_seqlen: int | None = None,
    ) -> None:
        if budget is not None and capacity is not None:
            raise ValueError(f"budget is {budget} and capacity is {capacity}; accepted: one of them")
        if obstacle := graph_obstacle(model, budget, capacity):
            raise ValueError(obstacle)
        config, weight = model.config, next(model.parameters())
        self.config, self.objective = config, model.objective
        self.batch, self._fixed = batch, FixedModel(model)
        self._drops = isinstance(model, DCDiT) and budget is None
        self._why = "of a static model" if budget is None else f"with budget={budget}"
        device = weight.device
        self._x = torch.zeros(batch, config.in_channels, *config.grid, dtype=weight.dtype, device=device)
        self._t = torch.zeros(batch, dtype=torch.float32, device=device)
        self._y = torch.zeros(batch, dtype=torch.int64, device=device)
        self._drop = torch.zeros(batch, dtype=torch.float32, device=device)
        self.overflow = torch.zeros((), dtype=torch.int64, device=device)
        """() int64: tokens that the capacity dropped so far, in all replays. Reading it is a sync."""

        sizes: dict[str, Any] = {"budget": budget, "capacity": capacity, "max_seqlen": max_seqlen}

        def forward() -> Tensor:
            if not isinstance(model, DCDiT):
                return model(self._x, self._t, self._y)
            drop = {} if budget is not None else {"drop_fraction": self._drop}
            out, routing = model(self._x, self._t, self._y, **sizes, **drop, return_routing=True)
            self.overflow += routing.selection.overflow
            return out

        self.pool = cuda.driver.new_pool() if pool is None else pool
        with torch.no_grad():
            what = f"a forward pass of {batch} images"
            self._graph = cuda.capture(forward, device, self.pool, what, warmup)
        self.overflow.zero_()

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, drop_fraction: float | Tensor = 0.0) -> Tensor:
        """The model's output for a batch, as a fresh tensor.

        Raises:
            ValueError: another batch size than was captured, a drop fraction on top of a fixed budget, or a model that
                changed since.
        """
        if x.shape[0] != self.batch:
            raise ValueError(f"x holds {x.shape[0]} images; this graph was captured for {self.batch}")
        if not self._drops and (isinstance(drop_fraction, Tensor) or drop_fraction > 0):
            raise ValueError(f"this graph takes no drop_fraction: it was captured {self._why}")
        self._fixed.check()
        with torch.no_grad():
            self._x.copy_(x)
            self._t.copy_(t)
            self._y.copy_(y)
            self._drop.copy_(drop_fraction) if isinstance(drop_fraction, Tensor) else self._drop.fill_(drop_fraction)
            self._graph.replay()
            return self._graph.outputs.clone()
