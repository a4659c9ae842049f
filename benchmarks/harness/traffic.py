"""The least memory traffic of an operation: each input read once, each output written once.

Only what the mathematics needs is counted: a gather reads the kept rows and not the grid, the backward of a sum passes
its gradient on. Nobody can move less; an implementation that spills intermediates to memory moves more.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import avg_pool2d

from dcdit.ops import TokenSelection
from dcdit.profiling.workloads import Workload


class _Needs(NamedTuple):
    """Arguments, by position, that a direction reads; gradients, by place among the differentiable, that it writes."""

    forward: tuple[int, ...]
    backward: tuple[int, ...] = ()
    gradients: tuple[int, ...] = ()


_DECHUNK_BACKWARD = (0, 1)  # h and p; the residual's gradient is the output's, and no gate value enters
_NEEDS = {
    "boundary_prob_cosine": _Needs((0, 1), (0, 1), (0, 1)),
    "boundary_prob_cosine2d": _Needs((0, 1, 2), (0, 1, 2), (0, 1, 2)),
    "boundary_prob_predictability": _Needs((0, 1, 2, 3, 4), (0, 1, 2, 3), (0, 1, 2, 3, 4)),
    "select_tokens": _Needs((0,)),
    "select_tokens_drop": _Needs((0,)),
    "scatter_tokens": _Needs((0,), (), (0,)),
    "dechunk_spatial": _Needs((0, 1, 6), _DECHUNK_BACKWARD, (0, 1, 2)),
    "dechunk_ema": _Needs((0, 1, 4), _DECHUNK_BACKWARD, (0, 1, 2)),
    "ratio_loss": _Needs((0, 1), (1,), (0,)),
    "modulated_layer_norm": _Needs((0, 1, 2), (0, 2), (0, 1, 2)),
    "gated_add": _Needs((0, 1, 2), (1, 2), (1, 2)),
    "gated_add_modulated_layer_norm": _Needs((0, 1, 2, 3, 4), (0, 1, 2, 4), (0, 1, 2, 3, 4)),
}


def least_bytes(name: str, workload: Workload, outputs: Sequence[Tensor], backward: bool) -> int:
    """Bytes that the operation has to move, forward or forward and backward.

    Args:
        name: of the workload.
        workload: its inputs.
        outputs: what the forward returned.
        backward: whether the backward counts too.
    """
    written = _bytes(outputs)
    indices = sum(_bytes([arg.indices, arg.cu_seqlens]) for arg in workload.args if isinstance(arg, TokenSelection))
    if name == "gather_tokens":
        x, sel, bias = workload.args
        kept = _bytes(outputs)
        table = min(sel.indices.shape[0], bias.shape[0]) * bias.shape[1] * bias.element_size()
        forward = kept + table + indices + written
        return forward + (kept + indices + _bytes([x]) if backward else 0)
    needs = _NEEDS[name]
    total = _bytes([workload.args[i] for i in needs.forward]) + indices + written
    if backward:
        read = _bytes([workload.args[i] for i in needs.backward]) + indices + written
        total += read + _bytes([workload.differentiable[i] for i in needs.gradients])
    return total


def least_flops(name: str, workload: Workload) -> int | None:
    """FLOPs of the forward where arithmetic and not memory could be the limit: the smoothing of the spatial de-chunk.

    Counted over the pairs of kept tokens whose weight float32 can tell from zero (6 sigma): 2 D per pair.
    """
    if name != "dechunk_spatial":
        return None
    h, _, sel, grid, sigma, *_ = workload.args
    reach = int(6 * sigma)
    window = sel.mask.view(-1, 1, *grid).float()
    side = 2 * reach + 1
    within = avg_pool2d(window, side, 1, reach, divisor_override=1)
    return int(2 * h.shape[1] * (within * window).double().sum())


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
