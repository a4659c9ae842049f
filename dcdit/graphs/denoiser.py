"""One forward pass of a model as a graph. In a DC-DiT, a fixed budget or a capacity makes every shape static.

Which tokens are kept still changes from replay to replay.
"""

from typing import Any

import torch
from torch import Tensor

from dcdit.graphs.inputs import ForwardInputs
from dcdit.graphs.safety import FixedModel, autocast_dtype, graph_obstacle
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
        pool: of another graph on this device, to share its memory: ``other.pool``.
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
        sizes = {"budget": budget, "capacity": capacity, "max_seqlen": max_seqlen}
        if budget is not None and capacity is not None:
            raise ValueError(f"budget is {budget} and capacity is {capacity}; accepted: one of them")
        if obstacle := graph_obstacle(model, budget, capacity):
            raise ValueError(obstacle)
        given = [f"{name}={value}" for name, value in sizes.items() if value is not None]
        if given and not isinstance(model, DCDiT):
            raise ValueError(f"{given[0]} is for a DC-DiT; accepted for a {type(model).__name__}: none")
        if batch < 1:
            raise ValueError(f"batch is {batch}; accepted: at least 1")
        self.config, self.objective = model.config, model.objective
        self.batch, self._fixed = batch, FixedModel(model)
        self._drops = isinstance(model, DCDiT) and budget is None
        self._why = "of a static model" if budget is None else f"with budget={budget}"
        self._inputs, device = ForwardInputs(model, batch), next(model.parameters()).device
        self._autocast = autocast_dtype(device)

        def forward() -> Tensor:
            inputs = self._inputs
            if not isinstance(model, DCDiT):
                return model(inputs.x, inputs.t, inputs.y)
            drop: dict[str, Any] = {} if budget is not None else {"drop_fraction": inputs.drop}
            out, routing = model(inputs.x, inputs.t, inputs.y, **sizes, **drop, return_routing=True)
            self.overflow += routing.selection.overflow
            return out

        with torch.inference_mode(False):
            self.overflow = torch.zeros((), dtype=torch.int64, device=device)
            """() int64: tokens that the capacity dropped so far, in all replays. Reading it is a sync."""
        self.pool = cuda.new_pool(device) if pool is None else pool
        with torch.no_grad():
            what = f"a forward pass of {batch} images"
            self._graph = cuda.capture(forward, device, self.pool, what, warmup)
        self.overflow.zero_()

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, drop_fraction: float | Tensor = 0.0) -> Tensor:
        """The model's output for a batch, as a fresh tensor.

        Raises:
            ValueError: another batch size or another autocast dtype than was captured, inputs that the model refuses, a
                drop fraction on top of a fixed budget, or a model that changed since.
        """
        if x.shape[0] != self.batch:
            raise ValueError(f"x holds {x.shape[0]} images; this graph was captured for {self.batch}")
        if not self._drops and (isinstance(drop_fraction, Tensor) or drop_fraction > 0):
            raise ValueError(f"this graph takes no drop_fraction: it was captured {self._why}")
        if (autocast := autocast_dtype(self._inputs.x.device)) != self._autocast:
            raise ValueError(f"autocast is to {autocast}, and was to {self._autocast} when this graph was captured")
        self._fixed.check()
        with torch.no_grad():
            self._inputs.copy(x, t, y, drop_fraction)
            self._graph.replay()
            return self._graph.outputs.clone()
