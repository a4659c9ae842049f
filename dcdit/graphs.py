"""CUDA graphs: a forward pass is captured once and replayed, so that small batches do not wait for Python.

A dynamic model can be captured because a fixed budget or a capacity makes every shape static. Which tokens are kept
still changes from replay to replay.
"""

import torch
from torch import Tensor

from dcdit.models import DCDiT


class GraphedDenoiser:
    """One captured forward pass of a DC-DiT. It is called like the model, so :func:`dcdit.diffusion.sample` takes it.

    Args:
        model: a DC-DiT in evaluation mode on a CUDA device.
        batch: images per call, always exactly that many (with guidance, twice the samples).
        budget: tokens kept per image. Give either this or ``capacity``.
        capacity: static size of the packed buffer for the whole batch. Tokens beyond it are dropped, lowest p first,
            and counted in :attr:`overflow`.
        warmup: eager forward passes before the capture. They compile kernels and fill caches.

    Raises:
        ValueError: the model is not on a CUDA device or is training, or not one of budget and capacity is given.
    """

    def __init__(
        self, model: DCDiT, batch: int, budget: int | None = None, capacity: int | None = None, warmup: int = 3
    ) -> None:
        weight = next(model.parameters())
        if not weight.is_cuda:
            raise ValueError(f"the model is on {weight.device}; CUDA graphs need a CUDA device")
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() first")
        if (budget is None) == (capacity is None):
            raise ValueError(f"budget is {budget} and capacity is {capacity}; accepted: exactly one, for static shapes")
        config = model.config
        self.config, self.objective = config, model.objective
        self.batch = batch
        self._x = torch.zeros(batch, config.in_channels, *config.grid, dtype=weight.dtype, device=weight.device)
        self._t = torch.zeros(batch, dtype=torch.float32, device=weight.device)
        self._y = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self._drop = torch.zeros(batch, dtype=torch.float32, device=weight.device)
        self.overflow = torch.zeros((), dtype=torch.int64, device=weight.device)
        """() int64: tokens that the capacity dropped so far, in all replays. Reading it is a sync."""

        def forward() -> Tensor:
            drop = {} if budget is not None else {"drop_fraction": self._drop}
            out, routing = model(
                self._x, self._t, self._y, budget=budget, capacity=capacity, return_routing=True, **drop
            )
            self.overflow += routing.selection.overflow
            return out

        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode():
            stream = torch.cuda.Stream(weight.device)
            stream.wait_stream(torch.cuda.current_stream(weight.device))
            with torch.cuda.stream(stream):
                for _ in range(warmup):
                    forward()
            torch.cuda.current_stream(weight.device).wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self._out = forward()
            self.overflow.zero_()
        self._fixed_budget = budget

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, drop_fraction: float | Tensor = 0.0) -> Tensor:
        """The model's output for a batch, as a fresh tensor.

        Raises:
            ValueError: another batch size than was captured, or a drop fraction on top of a fixed budget.
        """
        if x.shape[0] != self.batch:
            raise ValueError(f"x holds {x.shape[0]} images; this graph was captured for {self.batch}")
        if self._fixed_budget is not None and (isinstance(drop_fraction, Tensor) or drop_fraction > 0):
            raise ValueError(f"the graph was captured with budget={self._fixed_budget}; it takes no drop_fraction")
        self._x.copy_(x)
        self._t.copy_(t)
        self._y.copy_(y)
        self._drop.copy_(drop_fraction) if isinstance(drop_fraction, Tensor) else self._drop.fill_(drop_fraction)
        self._graph.replay()
        return self._out.clone()
