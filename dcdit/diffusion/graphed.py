"""Sampler steps as CUDA graphs: one launch a step, however many kernels it has."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dcdit.diffusion.guidance import Guided
from dcdit.diffusion.step import Branches, SamplerStep, Taken
from dcdit.graphs.safety import FixedModel, autocast_dtype, graph_obstacle
from dcdit.utils import cuda
from dcdit.utils.recent import RecentlyUsed

TakeStep = Callable[[Branches], Taken]
"""What a :class:`SamplerStep` is called as."""
WORTHWHILE = 20
"""Steps from which on a run is captured without being asked: a capture takes the time of about four of them."""


class SamplerGraphs:
    """The captured steps of sampling runs, which :func:`dcdit.diffusion.sample` uses again in its next call.

    A graph holds all of a step: both branches of guidance, the drop fractions, the model, the update and the noise. It
    is captured once for each kind of work: shapes, method, guidance scale, budget or capacity, autocast, and which
    branches are computed. Labels, seeds, drop schedules and the numbers of the sampler are read from memory, so they
    may change between calls. All graphs of a device share one pool of memory. The models are kept alive. What a graph
    forbids stands in :mod:`dcdit.graphs`.

    Args:
        limit: runs of different work to keep; the one that was not used for longest goes first.
        optional: a capture that fails gives a warning, and the run goes on without a graph.

    Example:
        >>> import torch
        >>> from dcdit.diffusion import SamplerGraphs, sample
        >>> from dcdit.models import create_model
        >>> model = create_model("DC-DiT-S", grid=(4, 4), hidden_size=128, depth=1, num_heads=2, num_classes=10).eval()
        >>> graphs = SamplerGraphs()  # on a GPU: model.cuda(), and labels there
        >>> sample(model, torch.tensor([3]), num_steps=4, budget=4, graph=graphs, progress=False)
        Traceback (most recent call last):
            ...
        ValueError: the model is on cpu; CUDA graphs need a CUDA device
    """

    def __init__(self, limit: int = 16, optional: bool = False) -> None:
        if limit < 1:
            raise ValueError(f"limit is {limit}; accepted: at least 1")
        self._optional = optional
        self._runs: RecentlyUsed[tuple[Any, ...], _Run] = RecentlyUsed(limit)
        self._pools: dict[torch.device, cuda.Pool] = {}

    def adopt(self, step: SamplerStep) -> TakeStep:
        """What to call in place of a step: it replays the graph of equal work, and the run moves to its memory.

        The tensors that it returns are overwritten by its next call.

        Raises:
            ValueError: the model cannot be captured, or has changed since it was.
            CaptureError: the capture failed.
        """
        model = step.guided.model
        captured = captured_model(model)
        if obstacle := obstacle_of(step.guided):
            raise ValueError(obstacle)
        device = step.x.device
        if device not in self._pools:
            self._pools[device] = cuda.new_pool(device)
        pool, modes = self._pools[device], (autocast_dtype(device), torch.is_inference_mode_enabled())
        key = (id(captured), type(model), getattr(model, "observes", None), *modes, *step.work())
        run = self._runs.use(key, lambda: _Run(step, FixedModel(captured), pool, self._optional))
        run.fixed.check()
        run.load(step)
        return run


@dataclass
class _Run:
    step: SamplerStep
    fixed: FixedModel
    pool: cuda.Pool
    optional: bool
    failed: bool = False
    graphs: dict[Branches, cuda.Captured] = field(default_factory=dict)

    def load(self, step: SamplerStep) -> None:
        """Begin another run in the memory of the graphs."""
        if step is self.step:
            return
        for mine, new in zip(self.step.tensors(), step.tensors(), strict=True):
            mine.copy_(new)

    def __call__(self, branches: Branches) -> Taken:
        graph = self.graphs.get(branches)
        if graph is None and not self.failed:
            graph = self._capture(branches)
        if graph is None:
            return self.step(branches)
        graph.replay()
        taken: Taken = graph.outputs
        return taken

    def _capture(self, branches: Branches) -> cuda.Captured | None:
        """The steps of the warm-up are taken back, also where the capture fails."""
        before = [tensor.clone() for tensor in self.step.state]

        def undo() -> None:
            for tensor, value in zip(self.step.state, before, strict=True):
                tensor.copy_(value)

        what, device = f"a step of {self.step.method}", self.step.x.device
        try:
            graph = cuda.capture(lambda: self.step(branches), device, self.pool, what, undo=undo)
        except cuda.CaptureError as error:
            if not self.optional:
                raise
            warnings.warn(f"sampling goes on without CUDA graphs: {error}", stacklevel=5)
            self.failed = True
            return None
        finally:
            undo()
        self.graphs[branches] = graph
        return graph


def captured_model(model: Callable[..., Any]) -> Any:
    """The model itself, inside of what records its calls."""
    return getattr(model, "model", model) if hasattr(model, "observe") else model


def obstacle_of(guided: Guided) -> str | None:
    """Why sampling with this model cannot be captured; None if it can."""
    return graph_obstacle(captured_model(guided.model), guided.budget, guided.capacity)
