"""Training that diverged: an error that says what is not finite, and since which step.

Whoever looks at a number waits for the device, so nothing is looked at after every step. Metrics are checked when they
are read for a record. Before weights are validated or saved, the metrics of the steps since the last record and the
weights themselves are checked.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dcdit.train.sharding import local


def diverged(what: str, step: int) -> FloatingPointError:
    """The error that says so."""
    return FloatingPointError(f"{what} at step {step}; lower optim.lr or check the data")


def check_metrics(names: Sequence[str], rows: Sequence[Sequence[float]], step: int) -> None:
    """Raise FloatingPointError if a metric is not finite.

    Args:
        rows: the metrics of consecutive steps, the last of which is ``step``.
    """
    for number, row in enumerate(rows, step - len(rows) + 1):
        for name, value in zip(names, row, strict=True):
            if not math.isfinite(value):
                words = {"grad_norm": "gradient norm"}.get(name, name.replace("_", " "))
                raise diverged(f"the {words} is {value}", number)


def check_tensors(
    parts: Mapping[str, Sequence[Tensor]],
    step: int,
    agreed: Callable[[Tensor], Tensor] = lambda finite: finite,
) -> None:
    """Raise FloatingPointError if a tensor is not finite.

    Args:
        parts: what the tensors are, in the plural, to the tensors of this process. The first part is on its device.
        step: after which they are what they are.
        agreed: from the flags (parts,) bool of this process to those that count.
    """
    device = next(iter(parts.values()))[0].device
    finite = torch.stack([_all_finite(tensors, device) for tensors in parts.values()])
    for name, fine in zip(parts, agreed(finite).tolist(), strict=True):
        if not fine:
            raise diverged(f"the {name} are not finite", step)


def _all_finite(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    flags = [local(tensor).isfinite().all().to(device) for tensor in tensors]
    return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=device)
