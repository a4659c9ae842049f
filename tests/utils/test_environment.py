"""Devices as users name them, and what is installed."""

import numpy as np
import pytest
import torch

from dcdit.utils import environment
from dcdit.utils.environment import cpu_name, device_name, package_versions, resolve_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Say how many GPUs PyTorch sees."""

    def see(count: int) -> None:
        monkeypatch.setattr(environment.torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(environment.torch.cuda, "device_count", lambda: count)

    return see


@pytest.mark.parametrize(
    ("name", "count", "device"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_devices(gpus, name: str, count: int, device: str) -> None:
    gpus(count)
    assert resolve_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("banana", 0, "device is 'banana'; accepted here: auto, cpu$"),
        ("cuda", 0, "device is 'cuda', but no CUDA device is visible to PyTorch; accepted here: auto, cpu$"),
        ("cuda:1", 0, "device is 'cuda:1', but no CUDA device is visible to PyTorch; accepted here: auto, cpu$"),
        ("cuda:2", 2, "device is 'cuda:2'; accepted here: auto, cpu, cuda, cuda:0, cuda:1$"),
        ("cuda:x", 1, "device is 'cuda:x'; accepted here: auto, cpu, cuda, cuda:0$"),
    ],
)
def test_devices_that_are_not_here(gpus, name: str, count: int, message: str) -> None:
    gpus(count)
    with pytest.raises(ValueError, match=message):
        resolve_device(name)


def test_names_of_devices() -> None:
    assert device_name(torch.device("cpu")) == "cpu"
    assert cpu_name()


def test_versions() -> None:
    assert package_versions(["numpy", "no-such-package"]) == {"numpy": np.__version__, "no-such-package": None}
