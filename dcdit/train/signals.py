"""Ctrl-C and SIGTERM as a request to finish the step and save."""

import signal
import threading
from typing import Any


class Signals:
    """Inside the block, the first Ctrl-C or SIGTERM is only noted; the second acts as usual."""

    def __init__(self) -> None:
        self.caught = False

    def __enter__(self) -> "Signals":
        # Python delivers signals to the main thread only; elsewhere there is nothing to note.
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
