"""Where kernels run without a GPU: in Triton's interpreter, or as the PTX compiled for one (`make ptx-test`)."""

import functools
import os

import pytest
from support import interpreter_launch, interpreter_rounding, interpreter_scan

from tools.ptx.launch import Launcher

PTX_TARGET = os.environ.get("DCDIT_PTX")
"""A compute capability (80, 90 or 100): kernels run as the PTX compiled for it. None: in the interpreter."""


@functools.cache
def _ptx_launcher() -> Launcher:
    return Launcher(int(PTX_TARGET or 90))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every launch until the monkeypatch is undone. On a GPU it changes nothing, unless a PTX target is set."""
    if PTX_TARGET:
        _ptx_launcher().install(monkeypatch)
    else:
        interpreter_launch.install(monkeypatch)
        interpreter_scan.install(monkeypatch)
        interpreter_rounding.install(monkeypatch)
