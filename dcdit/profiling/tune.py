"""Find launch configurations for this GPU.

Only the command tunes. Without a file for the device, kernels use the shipped conservative defaults.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dcdit import ops
from dcdit.profiling.timing import time_variants
from dcdit.profiling.workloads import Shape, create_workload

Config = dict[str, int]
MAX_WARPS = 16
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Against results of the default configuration, which the tests check: sums may run in another order."""


def tune(names: Sequence[str], shapes: Sequence[Shape], seconds: float) -> dict[str, list[dict[str, Any]]]:
    """The fastest configuration found for every kernel that the operations start, as the files of devices hold it.

    One kernel after the other: halve or double one number of its configuration, as long as that makes the operation,
    forward and backward, faster and its results stay the same.

    Args:
        names: workloads.
        shapes: what they run on.
        seconds: timing budget per candidate.
    """
    from tqdm import tqdm

    table: dict[str, list[dict[str, Any]]] = {}
    for name, shape in tqdm([(n, s) for n in names for s in shapes], desc="tune", unit="op"):
        for kernel, key, config in _kernels_of(name, shape):
            best = _climb(name, shape, kernel, config, seconds)
            entries = table.setdefault(kernel, [])
            if not any(entry["shape"] == key for entry in entries):
                entries.append({"shape": key, "config": best})
    return table


def _kernels_of(name: str, shape: Shape) -> list[tuple[str, dict[str, int], Config]]:
    """(kernel, shape key, configuration in use) of every kernel that a workload starts."""
    from dcdit.kernels.launch import observe_configs

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


def _results(name: str, shape: Shape) -> tuple[torch.Tensor, ...]:
    workload = create_workload(name, shape)
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
    workload = create_workload(name, shape)
    with ops.use_backend("triton"):
        return time_variants({name: workload.run}, shape.device, seconds)[name]
