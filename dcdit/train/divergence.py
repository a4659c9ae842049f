"""Training that diverged: an error that says what is not finite, and since which step.

Whoever looks at a number waits for the device, so nothing is looked at after every step. Metrics are checked when they
are read for a record. Before weights are validated or saved, the metrics of the steps since the last record and the
weights themselves are checked.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dcdit.train.sharding import local


def check_metrics(names: Sequence[str], rows: Sequence[Sequence[float]], step: int) -> None:
    """Raise FloatingPointError if a metric is not finite.

    Args:
        rows: the metrics of consecutive steps, the last of which is ``step``.
    """
    for number, row in enumerate(rows, step - len(rows) + 1):
        for name, value in zip(names, row, strict=True):
            if not math.isfinite(value):
                words = {"grad_norm": "gradient norm"}.get(name, name.replace("_", " "))
                raise _diverged(f"the {words} is {value}", number)


def check_tensors(parts: Mapping[str, Iterable[Tensor]], step: int, accelerator: Any) -> None:
    """Raise FloatingPointError, on every process, if a tensor of any process is not finite.

    Args:
        parts: what the tensors are, in the plural, to the tensors of this process.
    """
    finite = torch.stack([_all_finite(tensors, accelerator.device) for tensors in parts.values()])
    _check_flags(list(parts), accelerator.gather(finite[None].int()).amin(0), step)


@contextlib.contextmanager
def router_errors_explained(
    check_earlier: Callable[[], None], parts: Mapping[str, Iterable[Tensor]], step: int, device: torch.device
) -> Iterator[None]:
    """Turn the router's error about NaN, which comes before there is a loss, into one that says what diverged.

    Args:
        check_earlier: raises FloatingPointError if it was an earlier step.
        parts: what the forward pass inside the block reads, as in :func:`check_tensors`.
        step: that it belongs to.
    """
    try:
        yield
    except ValueError as error:
        if "NaN" not in str(error):
            raise
        check_earlier()
        _check_flags(list(parts), torch.stack([_all_finite(tensors, device) for tensors in parts.values()]), step)
        raise _diverged("the router's probabilities are not finite", step) from None


def _all_finite(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    flags = [local(tensor).isfinite().all().to(device) for tensor in tensors]
    return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=device)


def _check_flags(names: Sequence[str], finite: Tensor, step: int) -> None:
    for name, fine in zip(names, finite.tolist(), strict=True):
        if not fine:
            raise _diverged(f"the {name} are not finite", step)


def _diverged(what: str, step: int) -> FloatingPointError:
    return FloatingPointError(f"{what} at step {step}; lower optim.lr or check the data")
