"""The least memory traffic of an operation: each input read once, each output written once.

Only what the mathematics needs is counted: a gather reads the kept rows and not the grid, the backward of a sum passes
its gradient on. Nobody can move less; an implementation that writes intermediate results to memory moves more.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

from dcdit.ops import TokenSelection
from dcdit.profiling.workloads import Workload


def least_bytes(workload: Workload, outputs: Sequence[Tensor], backward: bool) -> int:
    """Bytes that an operation has to move, forward or forward and backward.

    Args:
        workload: the operation and its arguments.
        outputs: what the forward returned.
        backward: whether the backward counts too.
    """
    operation, arguments = workload.operation, workload.arguments
    selections = [value for value in arguments.values() if isinstance(value, TokenSelection)]
    indices = sum(_bytes([sel.indices, sel.cu_seqlens]) for sel in selections)
    written = _bytes(outputs)

    def named(names: Iterable[str]) -> list[Tensor]:
        return [arguments[name] for name in names if arguments.get(name) is not None]

    total = _bytes(named(operation.forward_reads)) + indices + written
    for sel in selections:
        total += sum(_bytes_of_rows(x, len(sel.indices)) for x in named(operation.forward_reads_kept))
    if backward:
        # The gradients of the outputs have the outputs' size.
        total += _bytes(named(operation.backward_reads)) + indices + written
        total += _bytes(named(operation.backward_writes))
    return total


def least_flops(workload: Workload) -> int | None:
    """FLOPs of the forward, where arithmetic and not memory could be the limit; else None."""
    flops = workload.operation.flops
    return None if flops is None else flops(**workload.arguments)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _bytes_of_rows(x: Tensor, rows: int) -> int:
    """Of so many rows (..., D); several positions may share one, so never more than all of them."""
    width = x.shape[-1]
    return min(rows, x.numel() // width) * width * x.element_size()
