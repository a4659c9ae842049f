"""The ratio loss as H-Net states it (arXiv 2507.07955, section 2.3, equation 10)."""

from torch import Tensor

from dcdit import ops
from dcdit.profiling.workloads.core import Arguments, Call, Case, Inputs, Operation


def _whole_batch(inputs: Inputs) -> Arguments:
    p = inputs.probabilities()
    return {"p": p, "natural_mask": p.detach() > 0.5, "target": 4.0}


def _grouped(inputs: Inputs) -> Arguments:
    p = inputs.probabilities(inputs.shape.dtype)
    return {"p": p, "natural_mask": p.detach() > 0.5, "target": 4.0, "group_size": 1}


def _plain(p: Tensor, natural_mask: Tensor, target: float) -> Call:
    def call() -> Tensor:
        kept, mean = natural_mask.float().mean(), p.float().mean()
        return ((1 - kept) * (1 - mean) + kept * mean * (target - 1)) * target / (target - 1)

    return call


OPERATIONS = (
    Operation(
        ops.ratio_loss,
        plain=_plain,
        cases={"default": Case(_whole_batch), "grouped": Case(_grouped)},
        forward_reads=("p", "natural_mask"),
        backward_reads=("natural_mask",),
        backward_writes=("p",),
    ),
)
