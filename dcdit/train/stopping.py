"""Why a run stops before its last step: a signal, its time, or its training FLOPs."""

import os
import signal
import threading
import time
from typing import Any, NamedTuple

import torch

from dcdit.config import TrainConfig
from dcdit.train.compute import SpentFlops

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, the request of a scheduler or a launcher, and the end of a terminal."""
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""Variables that ``accelerate launch`` and ``torchrun`` set for the processes that they start."""
SAME_REQUEST = 2.0
"""Seconds within which a second Ctrl-C is the first one again: a terminal and a launcher both send it."""


class Signals:
    """Signals as a request to finish the step and save.

    Inside the block, the first signal is noted in ``caught``. A later Ctrl-C acts as usual; all other signals are
    ignored, because launchers repeat them. A launcher that ends before its processes counts as SIGTERM: that of one
    process, ``accelerate launch``, does not pass on the one that ended it.
    """

    def __init__(self) -> None:
        self._number = 0
        self._launcher: int | None = None

    @property
    def caught(self) -> int:
        """Number of the first signal; 0 if there was none."""
        if not self._number and self._launcher is not None and os.getppid() != self._launcher:
            self._number, self._at = signal.SIGTERM, time.monotonic()
        return self._number

    def __enter__(self) -> "Signals":
        self._launcher = os.getppid() if any(name in os.environ for name in LAUNCHERS) else None
        self._outer: dict[int, Any] = {}
        # Python delivers signals to the main thread only; another thread has none to note.
        if threading.current_thread() is threading.main_thread():
            self._outer = {number: signal.signal(number, self._note) for number in SIGNALS}
            if self._outer[signal.SIGHUP] is signal.SIG_IGN:  # nohup: the run outlives its terminal
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def _note(self, number: int, frame: Any) -> None:
        if not self._number:
            self._number, self._at = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._at > SAME_REQUEST:
            raise KeyboardInterrupt

    def __exit__(self, *error: object) -> None:
        for number, handler in self._outer.items():
            signal.signal(number, handler)


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
        values = torch.tensor(value)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, self._group)
        return int(values)
