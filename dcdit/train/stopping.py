"""Why a run stops before its last step: a signal, its time, or its training FLOPs."""

from typing import Any, NamedTuple

import torch

from dcdit.config import TrainConfig
from dcdit.train.compute import SpentFlops


class Stop(NamedTuple):
    """Whether a run stops, and why."""

    reason: str
    """``"steps"`` (not before the last one), ``"flops"``, ``"minutes"`` or ``"interrupt"``."""
    signal: int = 0
    """Number of the signal that interrupted it."""


NO_STOP = Stop("steps")
_REASONS = (NO_STOP, Stop("flops"), Stop("minutes"))
"""Of several reasons the last one counts, and an interrupt before all."""


class StopCheck:
    """Whether a run stops now. Every process stops at the same step, whichever of them has a reason to."""

    def __init__(self, config: TrainConfig, accelerator: Any, flops: SpentFlops) -> None:
        self.config, self.flops = config, flops
        # Through gloo the processes agree at every step without a wait for the device.
        self._group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def stop(self, at_record: bool, caught: int = 0, minutes: float = 0.0) -> Stop:
        """The same on every process, each of which has to call this.

        Args:
            at_record: whether this step has a record, with which the FLOPs are counted.
            caught: number of a signal to this process; 0 for none.
            minutes: since training began.
        """
        limits = self.config.run.minutes, self.config.optim.flops
        if caught:
            code = len(_REASONS) + caught
        elif limits[0] is not None and minutes >= limits[0]:
            code = 2
        else:
            code = int(limits[1] is not None and at_record and self.flops.spent >= limits[1])
        code = self.largest(code)
        return _REASONS[code] if code < len(_REASONS) else Stop("interrupt", code - len(_REASONS))

    def largest(self, value: int) -> int:
        """The largest value of all processes, each of which has to call this."""
        if self._group is None:
            return value
        values = torch.tensor(value, device="cpu")
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, self._group)
        return int(values)
