"""What a program runs on: devices, the processor, versions of packages."""

import platform
from collections.abc import Sequence
from importlib import metadata

import torch


def resolve_device(name: str) -> torch.device:
    """The device that a user names.

    Args:
        name: ``auto`` (a GPU if there is one, else the CPU), ``cpu``, ``cuda``, or one GPU of several as ``cuda:1``.

    Raises:
        ValueError: another name, or a GPU that is not here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    accepted = ["auto", "cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if name not in accepted:
        why = ", but no CUDA device is visible to PyTorch" if name.partition(":")[0] == "cuda" and not gpus else ""
        raise ValueError(f"device is {name!r}{why}; accepted here: {', '.join(accepted)}")
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The model of a GPU; ``cpu`` for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cpu_name() -> str:
    """The model of the processor, or its architecture where the system does not say."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def package_versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Package name to the version installed, or None."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
