"""Kernel tests run in the interpreter, as PTX on a CPU, or on a GPU if there is one. All outputs are poisoned first."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from support import poison, without_a_gpu

_COMMON = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", max_examples=15, **_COMMON)
settings.register_profile("full", max_examples=200, **_COMMON)
settings.load_profile("full" if os.environ.get("DCDIT_FULL") == "1" else "default")


@pytest.fixture(autouse=True)
def kernels_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_gpu.install(monkeypatch)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    poison.install(monkeypatch)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
