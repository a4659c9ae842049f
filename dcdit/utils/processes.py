"""Several processes of one command, as ``accelerate launch`` and ``torchrun`` start them."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager


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
