"""Other work on the machine, as this process feels it."""

import time
from pathlib import Path

THREADS = Path("/proc/self/task")


class ProcessorWait:
    """Measures how long the threads of this process were ready to run and waited for a processor (Linux only)."""

    def __init__(self) -> None:
        self._began, self._before = time.monotonic_ns(), _waited_by_thread()

    def share(self) -> float | None:
        """Fraction of the time until now that the thread with the longest wait waited.

        Threads that work together wait for the slowest of them. None where the system does not tell.
        """
        elapsed, after = time.monotonic_ns() - self._began, _waited_by_thread()
        waited = [after[thread] - self._before[thread] for thread in after.keys() & self._before.keys()]
        return max(waited) / max(1, elapsed) if waited else None


def _waited_by_thread() -> dict[str, int]:
    """Nanoseconds since each thread began; empty where the system does not count them."""
    found = {}
    for thread in THREADS.glob("*/schedstat"):
        try:
            ran, waited, _ = map(int, thread.read_text().split())
        except (OSError, ValueError):  # the thread has just ended, or another format
            continue
        if ran:
            found[thread.parent.name] = waited
    return found
