"""CUDA graphs: work is captured once and replayed, so that small batches do not wait for Python.

What runs between two steps of a sampler is captured by :class:`dcdit.diffusion.SamplerGraphs`, one forward pass by
:class:`GraphedDenoiser` (static shapes) and :class:`ExactGraphedDenoiser` (exactly the kept tokens).

What a graph forbids. It repeats what it captured, on the same memory. So the model must be in evaluation mode, and its
weights must stay as they were: replaced or changed weights are an error at the next call. Hooks ran at the capture and
run no more; a model with hooks is refused. Two graphs of one object write to the same buffers: calls from several
threads or on several streams at once give wrong results, which nothing detects.
"""

from dcdit.graphs.denoiser import GraphedDenoiser
from dcdit.graphs.exact import ExactGraphedDenoiser
from dcdit.graphs.safety import graph_obstacle
from dcdit.utils.cuda import CaptureError

__all__ = ["CaptureError", "ExactGraphedDenoiser", "GraphedDenoiser", "graph_obstacle"]
