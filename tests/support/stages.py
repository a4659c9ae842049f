"""FLOPs by stage, as PyTorch counts them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.utils.flop_counter import FlopCounterMode

from dcdit.nn import collect_stages


def counted_stages(call: Callable[[], object]) -> dict[str, int]:
    """FLOPs of each stage that the call enters. PyTorch counts linear layers, convolutions and products."""
    found: dict[str, int] = {}

    @contextmanager
    def collector(name: str) -> Iterator[None]:
        with FlopCounterMode(display=False) as counter:
            yield
        found[name] = found.get(name, 0) + counter.get_total_flops()

    with collect_stages(collector):
        call()
    return found
