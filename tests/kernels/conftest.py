"""Triton kernels are tested in the interpreter, or on a GPU where there is one; every output starts out poisoned."""

import importlib
import os
import pkgutil

import interpreter_memcheck
import interpreter_scan
import pytest
import torch
from hypothesis import HealthCheck, settings

import dcdit.kernels

_COMMON = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", max_examples=15, **_COMMON)
settings.register_profile("full", max_examples=200, **_COMMON)
settings.load_profile("full" if os.environ.get("DCDIT_FULL") == "1" else "default")


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory in which an element that no kernel wrote shows."""
    value = float("nan") if dtype.is_floating_point else True if dtype == torch.bool else torch.iinfo(dtype).min + 7
    return torch.full(shape, value, dtype=dtype, device=device)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter_memcheck.install(monkeypatch)
    interpreter_scan.install(monkeypatch)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in pkgutil.iter_modules(dcdit.kernels.__path__):
        loaded = importlib.import_module(f"dcdit.kernels.{module.name}")
        if hasattr(loaded, "empty"):
            monkeypatch.setattr(loaded, "empty", poisoned)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
