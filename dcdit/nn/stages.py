"""Named stages of a forward pass, so that a profiler can time them or count their FLOPs; without one they cost nothing.

The models mark their stages by hand, because forward hooks on submodules do less: on a submodule that ``torch.compile``
compiles in place they run inside the compiled code and break its graph, and most stages (embed, select, gather,
transformer, dechunk, final) are not exactly one submodule.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

STAGES = ("embed", "encoder", "router", "select", "gather", "transformer", "dechunk", "decoder", "final")

Collector = Callable[[str], AbstractContextManager]

_collector: Collector | None = None


def stage(name: str) -> AbstractContextManager:
    """The context to run a stage in: the collector's, or an empty one (always empty under ``torch.compile``)."""
    if torch.compiler.is_compiling() or _collector is None:
        return nullcontext()
    return _collector(name)


@contextmanager
def collect_stages(collector: Collector) -> Iterator[None]:
    """Run every stage entered inside the ``with`` block in ``collector(name)``.

    Args:
        collector: takes a name of ``STAGES`` and returns a context manager, e.g. ``torch.profiler.record_function``.
            It holds for the whole process, not per thread. A stage may be entered more than once in a forward pass.
    """
    global _collector
    outer, _collector = _collector, collector
    try:
        yield
    finally:
        _collector = outer
