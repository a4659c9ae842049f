"""Settings of every test process."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

# Decided before any kernel is imported: without a GPU, Triton kernels run in the interpreter, or compiled (tools/ptx).
if not torch.cuda.is_available() and "DCDIT_PTX" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
# One process per core runs (`-n 2`); more threads would only fight.
torch.set_num_threads(1)
# Tests hold float32 results against float64. A GPU would round the inputs of float32 convolutions to TF32, 11 bits.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def hang_up_ends_programs() -> Iterator[None]:
    """What tests of signals expect, also where the suite runs under ``nohup``, which has programs ignore one."""
    outer = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, outer)
