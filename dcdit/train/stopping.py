"""Why a run stops before its last step: Ctrl-C or SIGTERM, its time, or its training FLOPs."""

import signal
import threading
from typing import Any

import torch

from dcdit.config import TrainConfig
from dcdit.train.compute import SpentFlops

REASONS = ("steps", "flops", "minutes", "interrupt")
"""``"steps"``: not before the last step. Of several reasons the last one in this order counts."""


class Signals:
    """Ctrl-C and SIGTERM as a request to finish the step and save.

    Inside the block, the first signal is only noted in ``caught``; the second acts as usual.
    """

    def __init__(self) -> None:
        self.caught = False

    def __enter__(self) -> "Signals":
        # Python delivers signals to the main thread only; another thread has none to note.
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._outer = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.caught = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._outer.items():
            signal.signal(number, handler)

    def __exit__(self, *error: object) -> None:
        self._restore()


class StopCheck:
    """Whether a run stops now.

    Several processes must stop at the same step. They agree at records only, where they wait for one another anyway.
    """

    def __init__(self, config: TrainConfig, accelerator: Any, flops: SpentFlops) -> None:
        self.config, self.accelerator, self.flops = config, accelerator, flops

    def reason(self, at_record: bool, interrupted: bool = False, minutes: float = 0.0) -> str:
        """One of :data:`REASONS`, the same on every process.

        Args:
            at_record: whether this step has a record.
            interrupted: by a signal, to this process.
            minutes: since training began.
        """
        limit = self.config.optim.flops
        if interrupted:
            reason = "interrupt"
        elif self.config.run.minutes is not None and minutes >= self.config.run.minutes:
            reason = "minutes"
        elif limit is not None and at_record and self.flops.spent >= limit:
            reason = "flops"
        else:
            reason = "steps"
        if self.accelerator.num_processes == 1:
            return reason
        if not at_record:
            return "steps"
        own = torch.tensor([REASONS.index(reason)], device=self.accelerator.device)
        return REASONS[int(self.accelerator.gather(own).max())]
