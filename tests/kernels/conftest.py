"""Kernel tests run in the interpreter, as PTX on a CPU, or on a GPU if there is one. All outputs are poisoned first."""

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from support import interpreter_launch, interpreter_scan

from dcdit.kernels import launch
from tools.ptx.launch import Launcher

_COMMON = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", max_examples=15, **_COMMON)
settings.register_profile("full", max_examples=200, **_COMMON)
settings.load_profile("full" if os.environ.get("DCDIT_FULL") == "1" else "default")


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory filled with a value that shows where no kernel wrote."""
    value = float("nan") if dtype.is_floating_point else True if dtype == torch.bool else torch.iinfo(dtype).min + 7
    return torch.full(shape, value, dtype=dtype, device=device)


PTX_TARGET = os.environ.get("DCDIT_PTX")
"""A compute capability (80, 90 or 100): kernels run as the PTX compiled for it (`make ptx-test`)."""


@functools.cache
def ptx_launcher() -> Launcher:
    return Launcher(int(PTX_TARGET or 90))


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if PTX_TARGET:
        ptx_launcher().install(monkeypatch)
    else:
        interpreter_launch.install(monkeypatch)
        interpreter_scan.install(monkeypatch)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "empty", poisoned)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
