"""Find launch configurations for this GPU.

Only the command tunes. Without a file for the device, kernels use the shipped conservative defaults. Candidates run
inside CUDA graphs, on several copies of the inputs: one call at a time would time the host and not the kernel.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dcdit import ops
from dcdit.profiling.device_timing import copies_needed, time_graph, time_kernels
from dcdit.profiling.timing import time_variants
from dcdit.profiling.workloads import Shape, Workload, create_workload

Config = dict[str, int]
Table = dict[str, list[dict[str, Any]]]
"""Kernel -> its entries, as the files of devices hold them."""
MOST_COPIES = 8
MAX_WARPS = 16
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Against results of the default configuration, which the tests check: sums may run in another order."""


def tune(
    names: Sequence[str], shapes: Sequence[Shape], seconds: float, save: Callable[[Table], None] = lambda _: None
) -> Table:
    """The fastest configuration found for every kernel that the operations start.

    One kernel after the other: halve or double one number of its configuration, as long as that makes the operation,
    forward and backward, faster and its results stay the same.

    Args:
        names: workloads.
        shapes: what they run on.
        seconds: timing budget per candidate.
        save: called with the table so far whenever a kernel is done.
    """
    from tqdm import tqdm

    table: Table = {}
    for name, shape in tqdm([(n, s) for n in names for s in shapes], desc="tune", unit="op"):
        for kernel, key, config in _kernels_of(name, shape):
            entries = table.setdefault(kernel, [])
            if not any(entry["shape"] == key for entry in entries):
                entries.append({"shape": key, "config": _climb(name, shape, kernel, config, seconds)})
                save(table)
    return table


def merged(earlier: Table, table: Table) -> Table:
    """Two tables in one; the second wins where both have an entry for a kernel and a shape."""
    found = dict(earlier)
    for kernel, entries in table.items():
        shapes = [entry["shape"] for entry in entries]
        found[kernel] = [entry for entry in earlier.get(kernel, []) if entry["shape"] not in shapes] + entries
    return found


def _kernels_of(name: str, shape: Shape) -> list[tuple[str, dict[str, int], Config]]:
    """(kernel, shape key, configuration in use) of every kernel that a workload starts."""
    from dcdit.kernels.launch import observe_configs

    _workloads(name, shape)  # its inputs start kernels, too, and those are not what is tuned
    with observe_configs() as observed:
        _results(name, shape)
    unique = {kernel: (kernel, key, config) for kernel, key, config in observed}
    return list(unique.values())


def _climb(name: str, shape: Shape, kernel: str, config: Config, seconds: float) -> Config:
    from dcdit.kernels.launch import force_config

    expected = _results(name, shape)
    best, best_ms = config, _time(name, shape, seconds)
    improved = True
    while improved:
        improved = False
        for candidate in _neighbours(best):
            with force_config(kernel, candidate):
                if not _same(name, shape, expected):
                    continue
                ms = _time(name, shape, seconds)
            if ms < 0.98 * best_ms:  # smaller differences are noise
                best, best_ms, improved = candidate, ms, True
    return best


def _neighbours(config: Config) -> Iterator[Config]:
    for name, value in config.items():
        for changed in (value // 2, value * 2):
            if changed >= 1 and not (name == "num_warps" and changed > MAX_WARPS):
                yield {**config, name: changed}


@functools.lru_cache(maxsize=1)
def _workloads(name: str, shape: Shape) -> list[Workload]:
    """A workload and copies of it that together do not fit the L2 cache, made once for all of its candidates."""
    workload = create_workload(name, shape)
    size = sum(a.numel() * a.element_size() for a in workload.arguments.values() if isinstance(a, torch.Tensor))
    copies = copies_needed(size, shape.device, MOST_COPIES)
    return [workload, *(workload.copy() for _ in range(copies - 1))]


def _results(name: str, shape: Shape) -> tuple[torch.Tensor, ...]:
    workload = _workloads(name, shape)[0]
    with ops.use_backend("triton"):
        return workload.run()


def _same(name: str, shape: Shape, expected: tuple[torch.Tensor, ...]) -> bool:
    """Whether the configuration in use compiles, fits the GPU and computes the same."""
    try:
        results = _results(name, shape)
    except Exception:  # compilers and drivers raise errors of many kinds for a configuration that does not fit
        return False
    tolerance = TOLERANCE[shape.dtype]
    return all(_distance(a, b) <= tolerance for a, b in zip(results, expected, strict=True))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))


def _time(name: str, shape: Shape, seconds: float) -> float:
    """Milliseconds of the operation, forward and backward."""
    workloads = _workloads(name, shape)
    with ops.use_backend("triton"):
        if shape.device.type != "cuda":
            return time_variants({name: workloads[0].run}, shape.device, seconds)[name]
        ms = time_graph([workload.run for workload in workloads], shape.device, seconds)
        if ms is None:  # it waits for the device, as the exact mode of select_tokens does
            ms = time_kernels(workloads[0].run, shape.device)
    assert ms is not None
    return ms
