"""Which CUDA graphs a run of sampling takes."""

from typing import NamedTuple

from dcdit.diffusion import SamplerGraphs
from dcdit.diffusion.graphed import WORTHWHILE
from dcdit.graphs import ExactGraphedDenoiser, graph_obstacle
from dcdit.models import DCDiT, DiT
from dcdit.sample.options import SamplingOptions


class Sampled(NamedTuple):
    """How a model is sampled."""

    model: DCDiT | DiT | ExactGraphedDenoiser
    """The model, or its graphs."""
    graph: bool | SamplerGraphs
    """For :func:`dcdit.diffusion.sample`: graphs of whole steps, which all batches of a run share."""


def with_graphs(model: DCDiT | DiT, options: SamplingOptions) -> Sampled:
    """The model as ``options.graph`` wants it. True: in exact mode as graphs of the model, else as graphs of the steps.

    Raises:
        ValueError: graphs are asked for and cannot be.
    """
    if options.graph and isinstance(model, DCDiT) and options.budget is None and options.capacity is None:
        return Sampled(ExactGraphedDenoiser(model), False)
    obstacle = graph_obstacle(model, options.budget, options.capacity)
    if options.graph and obstacle:
        raise ValueError(obstacle)
    if options.graph is False or obstacle or (options.graph is None and options.steps < WORTHWHILE):
        return Sampled(model, False)
    return Sampled(model, SamplerGraphs(optional=options.graph is None))
