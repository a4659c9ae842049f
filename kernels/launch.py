"""Output memory, launch configurations and starts of all kernels.

Kernel files call ``launch.empty``, ``launch.config_for`` and ``launch.launch`` by these qualified names. A test that
replaces one of them here reaches every kernel.

The default configurations of a kernel are in its own file (``set_default_configs``). Those tuned for one device are in
``<device>.<architecture>.json``, in the package's ``configs/`` or in the user's folder, to which ``dcdit tune`` writes.
The user's win over the package's, and these over the defaults. A device without a file of its own takes that of another
device of its architecture: an H200 that of an H100.
"""

import functools
import importlib
import math
import os
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcdit.utils.reading import read_json

CONFIG_FOLDER = Path(__file__).parent / "configs"

Config = dict[str, int]
"""Tile sizes, ``num_warps`` and the other compile-time numbers of one launch."""

Entry = dict[str, Any]
"""``{"shape": sizes the kernel is tuned for, "config": Config}``, in memory as in the JSON files."""


class Launch(NamedTuple):
    """One recorded kernel start. The checks that need no GPU read it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


_recorded: list[Launch] | None = None
_defaults: dict[str, list[Entry]] = {}
_forced: dict[str, Config] = {}
_observed: list[tuple[str, dict[str, int], Config]] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Start a Triton kernel; an empty grid starts nothing.

    Raises:
        RuntimeError: the tensors are on a CPU and the Triton interpreter is off.
    """
    if 0 in grid:
        return
    if torch.version.hip is not None:
        meta.pop("maxnreg", None)  # an option of ptxas, which AMD does not use
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, meta))
        return
    for tensor in args:
        if isinstance(tensor, Tensor):
            break
    try:
        # Triton starts kernels on the current device, which can differ from the device of the tensors.
        if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
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
    """Collect the launches inside the block instead of starting them. Outputs stay unwritten."""
    global _recorded
    outer, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = outer


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for the output of a kernel. Tests replace this function to fill every output with NaN."""
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for a contiguous output of the shape and the device of ``rows``: often a cheaper call."""
    if dtype == rows.dtype and rows.is_contiguous():
        return torch.empty_like(rows)
    return empty(tuple(rows.shape), dtype, rows.device)


def set_default_configs(kernel: str, config: Config | None = None, **by_size: dict[int, Config]) -> None:
    """Register the default configurations of a kernel. Its file calls this once, when it is imported.

    Args:
        kernel: the name that ``config_for`` looks up; unique among all kernel files.
        config: the only configuration, for a kernel that is not tuned by a size.
        by_size: otherwise one configuration for each of a few sizes, e.g. ``D={32: {...}, 1024: {...}}``.

    Raises:
        ValueError: another kernel has this name.
    """
    entries: list[Entry] = [] if config is None else [{"shape": {}, "config": config}]
    for key, configs in by_size.items():
        entries += [{"shape": {key: size}, "config": config} for size, config in configs.items()]
    if _defaults.setdefault(kernel, entries) != entries:
        raise ValueError(f"kernel name {kernel!r} is taken; accepted is a name without default configurations")


def user_config_folder() -> Path:
    """Where ``dcdit tune`` writes: ``DCDIT_CONFIG_FOLDER``, else ``dcdit/configs`` in the user's cache folder."""
    given = os.environ.get("DCDIT_CONFIG_FOLDER")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/.cache")
    return Path(cache, "dcdit", "configs")


def read_configs(path: Path) -> dict[str, list[Entry]]:
    """The entries of a file of ``dcdit tune``, by kernel name.

    Raises:
        ValueError: a file of something else.
        OSError: it cannot be read.
    """
    try:
        tables = read_json(path)
        entries = [entry for table in tables.values() for entry in table]
        sizes = [size for entry in entries for size in (*entry["shape"].values(), *entry["config"].values())]
        if all(type(size) is int and size > 0 for size in sizes):
            return tables
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(
        f"{path} holds no launch configurations; accepted: a file of dcdit tune, whose numbers are positive integers"
    )


@functools.cache
def _tuned_configs(table: str | None) -> dict[str, list[Entry]]:
    paths = [folder / f"{table}.json" for folder in (CONFIG_FOLDER, user_config_folder())]
    found: dict[str, list[Entry]] = {}
    for path in filter(Path.is_file, paths):
        found |= read_configs(path)
    return found


def _is_current(kernel: str, entry: Entry) -> bool:
    """Whether an entry names the numbers that the kernel takes. The user's file may be older than the package."""
    return any(all(entry[part].keys() == own[part].keys() for part in own) for own in _defaults[kernel])


def shipped_configs() -> dict[str, list[Entry]]:
    """Every configuration in the package by kernel name: the defaults of all kernels, then those of tuned devices."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"{__package__}.{module.name}")
    found = {kernel: list(entries) for kernel, entries in _defaults.items()}
    for path in sorted(CONFIG_FOLDER.glob("*.json")):
        for kernel, entries in read_configs(path).items():
            found.setdefault(kernel, []).extend(entries)
    return found


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has. In the interpreter it is a small number, so that one program has several tiles there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def device_slug(device: torch.device) -> str:
    """File name, without ``.json``, of the configurations tuned for a device: its name and its architecture."""
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device).replace(" ", "_").replace("/", "_").replace(".", "_")
    if torch.version.hip is not None:
        return f"{name}.{torch.cuda.get_device_properties(device).gcnArchName.partition(':')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{name}.sm_{major}{minor}"


@functools.cache
def table_for(device: torch.device) -> str | None:
    """The name, without ``.json``, of the tuned configurations that a device uses.

    Its own, else those of another device of the same architecture, else None: then kernels use their defaults.
    """
    own = device_slug(device)
    folders = (user_config_folder(), CONFIG_FOLDER)
    if any((folder / f"{own}.json").is_file() for folder in folders):
        return own
    pattern = f"*.{own.rpartition('.')[2]}.json"
    same = [path for folder in folders for path in sorted(folder.glob(pattern))] if device.type == "cuda" else []
    return same[0].stem if same else None


@functools.cache
def _lookup(kernel: str, device: torch.device, shape: tuple[tuple[str, int], ...]) -> Config:
    tuned = _tuned_configs(table_for(device)).get(kernel, ())
    entries = [entry for entry in tuned if _is_current(kernel, entry)] or _defaults[kernel]
    sizes = dict(shape)

    def distance(entry: Entry) -> float:
        return sum(abs(math.log2(sizes[key] / size)) for key, size in entry["shape"].items())

    return min(entries, key=distance)["config"]


def config_for(kernel: str, device: torch.device, **shape: int) -> Config:
    """Launch configuration of a kernel: the device's tuned entry of the nearest shape, else the nearest default.

    Args:
        kernel: name in ``set_default_configs`` and in the JSON files.
        device: the device of the tensors.
        shape: the sizes that entries are tuned for, e.g. ``D=1152``. A sequence length is never among them.
    """
    config = _forced.get(kernel) or _lookup(kernel, device, tuple(shape.items()))
    if _observed is not None:
        _observed.append((kernel, shape, config))
    return config


@contextmanager
def force_config(kernel: str, config: Config) -> Iterator[None]:
    """Launch one kernel with this configuration inside the block. For tuning."""
    outer = dict(_forced)
    _forced[kernel] = config
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(outer)


@contextmanager
def observe_configs() -> Iterator[list[tuple[str, dict[str, int], Config]]]:
    """Collect (kernel, shape, configuration) of every look-up inside the block. For tuning."""
    global _observed
    outer, _observed = _observed, []
    try:
        yield _observed
    finally:
        _observed = outer
