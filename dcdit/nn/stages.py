"""Named stages of a forward pass, so that a profiler can time or count them; free when nobody listens."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

STAGES = ("embed", "encoder", "router", "select", "gather", "transformer", "dechunk", "decoder", "final")

Collector = Callable[[str], AbstractContextManager]

_collector: Collector | None = None


def stage(name: str) -> AbstractContextManager:
    """The context to run a stage in: the collector's, or nothing (always nothing under ``torch.compile``)."""
    if torch.compiler.is_compiling() or _collector is None:
        return nullcontext()
    return _collector(name)


@contextmanager
def collect_stages(collector: Collector) -> Iterator[None]:
    """Run every stage entered inside the ``with`` block in ``collector(name)``.

    Args:
        collector: takes a name out of ``STAGES``, returns a context manager, e.g. ``torch.profiler.record_function``.
            Process-wide, not per thread.
    """
    global _collector
    outer, _collector = _collector, collector
    try:
        yield
    finally:
        _collector = outer
