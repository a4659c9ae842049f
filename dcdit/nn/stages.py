"""Named stages of a forward pass, so that a profiler can time them or count their FLOPs; without one they cost nothing.

The models mark their stages by hand, because forward hooks on submodules do less: on a submodule that ``torch.compile``
compiles in place they run inside the compiled code and break its graph, and most stages (embed, select, gather,
transformer, dechunk, final) are not exactly one submodule.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

STAGES = ("embed", "encoder", "router", "select", "gather", "transformer", "dechunk", "decoder", "final")
"""The stages of a DC-DiT in their order. A static DiT has the first, the transformer and the last."""

Collector = Callable[[str], AbstractContextManager]

_collector: Collector | None = None


def stage(name: str) -> AbstractContextManager:
    """The context to run a stage in: the collector's, or an empty one (always empty under ``torch.compile``).

    Example:
        >>> from contextlib import nullcontext
        >>> from dcdit.nn import collect_stages, stage
        >>> seen = []
        >>> with collect_stages(lambda name: nullcontext(seen.append(name))), stage("router"):
        ...     pass
        >>> seen
        ['router']
    """
    if torch.compiler.is_compiling() or _collector is None:
        return nullcontext()
    return _collector(name)


@contextmanager
def collect_stages(collector: Collector) -> Iterator[None]:
    """Run every stage entered inside the ``with`` block in ``collector(name)``.

    Args:
        collector: takes a name of ``STAGES`` and returns a context manager, e.g. ``torch.profiler.record_function``.
            It holds for the whole process, not per thread. A stage may be entered more than once in a forward pass.

    Example:
        >>> import torch
        >>> from contextlib import nullcontext
        >>> from dcdit.models import create_model
        >>> from dcdit.nn import collect_stages
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10).eval()
        >>> seen = []
        >>> with collect_stages(lambda name: nullcontext(seen.append(name))):
        ...     _ = model(torch.zeros(1, 4, 4, 4), torch.tensor([500]), torch.tensor([3]))
        >>> seen
        ['embed', 'transformer', 'final']
    """
    global _collector
    outer, _collector = _collector, collector
    try:
        yield
    finally:
        _collector = outer
