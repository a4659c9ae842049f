"""Signals that ask a program to end: Ctrl-C, a scheduler or a launcher, the end of a terminal."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""Variables that ``accelerate launch`` and ``torchrun`` set for the processes that they start."""
SAME_REQUEST = 2.0
"""Seconds within which a second Ctrl-C is the first one again: a terminal and a launcher both send it."""


class Stopped(KeyboardInterrupt):
    """A signal asks the program to end. Like its base class, it passes through ``except Exception``."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number
        """Of the signal."""


class Signals:
    """Inside the block, the first signal is noted in ``caught``, and raised if asked for.

    A later Ctrl-C acts as usual. All other signals are then ignored, because launchers repeat them. An outer block
    counts a signal that an inner block has noted as its own first one. A launcher that ends before its processes counts
    as SIGTERM when ``caught`` is read: that of one process, ``accelerate launch``, does not pass on what ended it.

    Args:
        raising: raise :class:`Stopped`, instead of leaving it to the program to look at ``caught``.
    """

    def __init__(self, raising: bool = False) -> None:
        self.raising = raising
        self._number, self._at = 0, 0.0
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
            self._outer = {number: signal.signal(number, self) for number in SIGNALS}
            if self._outer[signal.SIGHUP] is signal.SIG_IGN:  # nohup: the program outlives its terminal
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Raise a signal when the block is done, whatever else it raises, and not in it.

        In the import of compiled code it might become another error, be lost, or abort the process.
        """
        raising, self.raising = self.raising, False
        try:
            yield
        finally:
            self.raising = raising
            if raising and self._number:
                raise Stopped(self._number)

    def __call__(self, number: int, frame: Any) -> None:
        if not self._number:
            self._number, self._at = number, time.monotonic()
            if self.raising:
                raise Stopped(number)
        elif number == signal.SIGINT and time.monotonic() - self._at > SAME_REQUEST:
            raise KeyboardInterrupt

    def __exit__(self, *error: object) -> None:
        for number, handler in self._outer.items():
            if isinstance(handler, Signals) and not handler._number:
                handler._number, handler._at = self._number, self._at
            signal.signal(number, handler)
