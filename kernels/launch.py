"""How every kernel gets its output memory, its launch configuration and its start: one small door for each."""

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CONFIG_FOLDER = Path(__file__).parent / "configs"


class Launch(NamedTuple):
    """One recorded kernel start: what the checks without a GPU look at."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


_recorded: list[Launch] | None = None
_forced: dict[str, dict[str, int]] = {}
_observed: list[tuple[str, dict[str, int], dict[str, int]]] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Start a Triton kernel; an empty grid starts nothing.

    Raises:
        RuntimeError: the tensors are on a CPU and the Triton interpreter is off.
    """
    if 0 in grid:
        return
    if torch.version.hip is not None:
        meta.pop("maxnreg", None)  # ptxas alone takes it
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, meta))
        return
    device = next(argument.device for argument in args if isinstance(argument, Tensor))
    try:
        # Triton starts on the current device, which need not be the tensors'.
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                kernel[grid](*args, **meta)
        else:
            kernel[grid](*args, **meta)
    except RuntimeError as error:
        if "active drivers" not in str(error):
            raise
        raise RuntimeError(
            "Triton kernels need a GPU that PyTorch sees; on a CPU use dcdit.ops.use_backend('torch'), "
            "or set TRITON_INTERPRET=1 before importing dcdit to run them in the interpreter"
        ) from error


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect the launches of the block instead of starting them (outputs stay unwritten)."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that a kernel is about to write. Tests replace this to poison every output first."""
    return torch.empty(shape, dtype=dtype, device=device)


@functools.cache
def _table(device_name: str) -> dict[str, list[dict[str, Any]]]:
    path = CONFIG_FOLDER / f"{device_name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def shipped_configs() -> dict[str, list[dict[str, Any]]]:
    """Every configuration that comes with the package, the defaults and those of tuned devices, by kernel name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in CONFIG_FOLDER.glob("*.json"):
        for kernel, entries in _table(path.stem).items():
            found.setdefault(kernel, []).extend(entries)
    return found


@functools.cache
def device_slug(device: torch.device) -> str:
    """File name under which a device's tuned configurations are kept."""
    if device.type != "cuda":
        return "default"
    return torch.cuda.get_device_name(device).replace(" ", "_").replace("/", "_")


@functools.cache
def _lookup(kernel: str, device: torch.device, shape: tuple[tuple[str, int], ...]) -> dict[str, int]:
    entries = _table(device_slug(device)).get(kernel) or _table("default")[kernel]
    wanted = dict(shape)

    def distance(entry: dict[str, Any]) -> float:
        return sum(abs(math.log2(wanted[key] / value)) for key, value in entry["shape"].items())

    return min(entries, key=distance)["config"]


def config_for(kernel: str, device: torch.device, **shape: int) -> dict[str, int]:
    """Launch configuration for a kernel: the device's tuned entry of the nearest shape, else the shipped default.

    Args:
        kernel: name in the JSON tables.
        device: where it runs.
        shape: what the entries are keyed by (never a sequence length), e.g. ``D=1152``.
    """
    config = _forced.get(kernel) or _lookup(kernel, device, tuple(shape.items()))
    if _observed is not None:
        _observed.append((kernel, shape, config))
    return config


@contextmanager
def force_config(kernel: str, config: dict[str, int]) -> Iterator[None]:
    """Launch one kernel with this configuration inside the block (tuning)."""
    outer = dict(_forced)
    _forced[kernel] = config
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(outer)


@contextmanager
def observe_configs() -> Iterator[list[tuple[str, dict[str, int], dict[str, int]]]]:
    """Collect (kernel, shape key, configuration) of every look-up of the block (tuning)."""
    global _observed
    outer, _observed = _observed, []
    try:
        yield _observed
    finally:
        _observed = outer
