"""Processes of the soak, of which none outlives it."""

import os
import threading
import time

SECONDS = 0.5


def end_with(parent: int) -> None:
    """End this process soon after its parent, whatever ended that."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS)
    os._exit(1)
