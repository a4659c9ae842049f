"""Several processes of one command, as ``accelerate launch`` and ``torchrun`` start them."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta

STORE_TIMEOUT = timedelta(seconds=5)
"""How long to look for the store through which the launcher connects the processes."""


def is_first_process() -> bool:
    """Whether this is the first of the processes that torchrun or ``accelerate launch`` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_first_to_say(message: str) -> bool:
    """Whether no other process of the command has asked this for the same message.

    So an error that all processes have is printed once, and an error of a single one is not lost. Where the processes
    cannot ask one another, the first of each machine prints.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if os.environ.get("WORLD_SIZE", "1") == "1" or address is None or port is None:
        return True
    import torch

    try:
        store = torch.distributed.TCPStore(address, int(port), is_master=False, timeout=STORE_TIMEOUT)
        return store.add(f"dcdit {os.environ.get('TORCHELASTIC_RESTART_COUNT')}: {message}", 1) == 1
    except (RuntimeError, ValueError):  # the first process, which may serve the store, has ended or never began
        return os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def on_main_process(main_process: bool, enter: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """A context that only the main process enters. If that fails there, every process raises the same error.

    Every process has to call this, after accelerate has connected them.

    Args:
        main_process: whether this is the main process.
        enter: makes the context.
    """
    from accelerate.utils import broadcast_object_list

    with contextlib.ExitStack() as stack:
        errors: list[Exception | None] = [None]
        if main_process:
            try:
                stack.enter_context(enter())
            except Exception as error:
                errors = [error]
        broadcast_object_list(errors)
        if errors[0] is not None:
            raise errors[0]
        yield
