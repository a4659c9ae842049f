"""How a run of sampling calls its model: as it is, in CUDA graphs, or cut to the width of each step."""

from typing import Any, NamedTuple

from dcdit.checkpoint import Model
from dcdit.diffusion import SamplerGraphs
from dcdit.diffusion.graphed import WORTHWHILE
from dcdit.diffusion.schedulers import SchedulerRun
from dcdit.graphs import ExactGraphedDenoiser, graph_obstacle
from dcdit.models import DCDiT, DyDiT, SlicedModel
from dcdit.sample.model_calls import call_times
from dcdit.sample.options import SamplingOptions


class Sampled(NamedTuple):
    """How a model is sampled."""

    model: Model | ExactGraphedDenoiser | SlicedModel
    """The model, its graphs, or its slices."""
    graph: bool | SamplerGraphs
    """For :func:`dcdit.diffusion.sample`: graphs of whole steps, which all batches of a run share."""


def ready_to_sample(model: Model, options: SamplingOptions, scheduler: Any = None) -> Sampled:
    """The model as ``options.graph`` wants it. True: in exact mode as graphs of the model, else as graphs of the steps.

    A model of dynamic width is cut to the width of each step instead: of a scheduler of diffusers if one is given.

    Raises:
        ValueError: graphs are asked for and cannot be.
    """
    if isinstance(model, DCDiT | DyDiT) and model.config.gate_shape is not None:
        if options.graph:
            raise ValueError(
                f"{options.checkpoint} has another width at each step, which no graph has; leave graph out"
            )
        if scheduler is None:
            times = call_times(options.method, options.steps)
        else:
            times = SchedulerRun(scheduler, options.steps, model.objective, options.checkpoint, 0.0, []).times
        return Sampled(SlicedModel(model, times), False)
    if options.graph and isinstance(model, DCDiT) and options.budget is None and options.capacity is None:
        return Sampled(ExactGraphedDenoiser(model), False)
    obstacle = graph_obstacle(model, options.budget, options.capacity)
    if options.graph and obstacle:
        raise ValueError(obstacle)
    if options.graph is False or obstacle or (options.graph is None and options.steps < WORTHWHILE):
        return Sampled(model, False)
    return Sampled(model, SamplerGraphs(optional=options.graph is None))
