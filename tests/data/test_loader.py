"""Loading processes end with the process that they work for."""

import os
import select
import signal
import time
from contextlib import suppress

import pytest
from torch.utils.data._utils import signal_handling

from dcdit.data import Photographs, batches


def test_a_killed_run_leaves_no_loading_process(monkeypatch):
    """Not even if it is killed as they start, before PyTorch knows whose processes they are."""
    reader, writer = os.pipe()
    run = os.fork()
    if not run:
        run = os.getpid()

        def kill_the_run():
            os.write(writer, str(os.getpid()).encode())
            os.kill(run, signal.SIGKILL)
            while os.getppid() == run:
                time.sleep(0.01)

        monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", kill_the_run)
        with suppress(BaseException):
            next(batches(Photographs(8), 0, 1, 2, workers=1))
        os._exit(1)
    os.close(writer)
    assert os.WTERMSIG(os.waitpid(run, 0)[1]) == signal.SIGKILL
    loading = int(os.read(reader, 100))
    # The pipe ends when the last process that holds it does.
    if not select.select([reader], [], [], 20)[0]:
        os.kill(loading, signal.SIGKILL)
        pytest.fail("the loading process is still there")
    assert os.read(reader, 1) == b""
    os.close(reader)
