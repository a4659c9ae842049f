"""Find launch configurations for this GPU.

Only the command tunes. Without a file for the device, kernels use the shipped conservative defaults. Candidates run
inside CUDA graphs, on several copies of the inputs: one call at a time would time the host and not the kernel.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

from dcdit import ops
from dcdit.profiling.device_timing import copies_needed, time_graph, time_kernels
from dcdit.profiling.reliability import DISAGREEMENT
from dcdit.profiling.rounds import disagreement, spread
from dcdit.profiling.timing import time_rounds
from dcdit.profiling.workloads import Shape, Workload, create_workload
from dcdit.utils.tables import markdown_table

Config = dict[str, int]
Table = dict[str, list[dict[str, Any]]]
"""Kernel -> its entries, as the files of devices hold them: for which shape, the configuration, and what was measured.
"""
LEAST_GAIN = 0.02
"""A configuration has to be faster by this share, or by the spread of the times where that is more."""
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
                entries.append({"shape": key, **_climb(name, shape, kernel, config, seconds)})
                save(table)
    return table


def merged(earlier: Table, table: Table) -> Table:
    """Two tables in one; the second wins where both have an entry for a kernel and a shape."""
    found = dict(earlier)
    for kernel, entries in table.items():
        shapes = [entry["shape"] for entry in entries]
        found[kernel] = [entry for entry in earlier.get(kernel, []) if entry["shape"] not in shapes] + entries
    return found


def report(table: Table) -> str:
    """The configurations with the times of their operations. What cannot be relied on is said first."""
    noisy, rows = [], []
    for kernel, entries in table.items():
        for entry in entries:
            measured = entry["measured"]
            where = f"{kernel} {_words(entry['shape'])}"
            noisy += [where] if _is_noisy(**measured) else []
            gain = "unreliable" if _is_noisy(**measured) else f"{measured['ms_before'] / measured['ms']:.2f}"
            times = [f"{measured[name]:.4f}" for name in ("ms_before", "ms_before_again", "ms")]
            rows.append([where, *times, f"±{measured['spread']:.0%}", gain, _words(entry["config"])])
    head = ["kernel", "ms before", "the same again", "ms now", "spread", "times faster", "configuration"]
    text = "Times are those of the operation that starts the kernel, forward and backward; the spread is half the "
    parts = [f"{text}interquartile range over the median, the larger of before and now.", markdown_table(head, rows)]
    if noisy:
        why = f"the times scatter by more than ±{DISAGREEMENT:.0%}, or before and again differ by more"
        parts.insert(0, f"Unreliable: {len(noisy)} of {len(rows)} ({why}): {', '.join(noisy)}.")
    return "\n\n".join(parts)


def _is_noisy(ms: float, spread: float, ms_before: float, ms_before_again: float) -> bool:
    # NaN, of a single time, is noise as well.
    return not (spread <= DISAGREEMENT and disagreement(ms_before, ms_before_again) <= DISAGREEMENT)


def _words(sizes: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def _kernels_of(name: str, shape: Shape) -> list[tuple[str, dict[str, int], Config]]:
    """(kernel, shape key, configuration in use) of every kernel that a workload starts."""
    from dcdit.kernels.launch import observe_configs

    _workloads(name, shape)  # its inputs start kernels, too, and those are not what is tuned
    with observe_configs() as observed:
        _results(name, shape)
    unique = {kernel: (kernel, key, config) for kernel, key, config in observed}
    return list(unique.values())


def _climb(name: str, shape: Shape, kernel: str, config: Config, seconds: float) -> dict[str, Any]:
    """The best configuration found, and what was measured on the way; see :data:`Table`."""
    from dcdit.kernels.launch import force_config

    expected = _results(name, shape)
    best, start = config, _time(name, shape, seconds)
    fastest, improved = start, True
    while improved:
        improved = False
        for candidate in _neighbours(best):
            with force_config(kernel, candidate):
                if not _same(name, shape, expected):
                    continue
                found = _time(name, shape, seconds)
            if found.is_faster_than(fastest):
                best, fastest, improved = candidate, found, True
    with force_config(kernel, config):
        again = _time(name, shape, seconds)
    measured = {"ms": fastest.ms, "spread": max(fastest.spread, start.spread)}
    return {"config": best, "measured": {**measured, "ms_before": start.ms, "ms_before_again": again.ms}}


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


class Timing(NamedTuple):
    """Median milliseconds of an operation, and how far they scatter (:func:`dcdit.profiling.rounds.spread`)."""

    ms: float
    spread: float

    def is_faster_than(self, other: "Timing") -> bool:
        """Whether it is, by more than noise. Times without a spread never are."""
        return all(self.ms < (1 - share) * other.ms for share in (LEAST_GAIN, self.spread, other.spread))


def _time(name: str, shape: Shape, seconds: float) -> Timing:
    """Of the operation, forward and backward."""
    workloads = _workloads(name, shape)
    with ops.use_backend("triton"):
        if shape.device.type != "cuda":
            times = time_rounds({name: workloads[0].run}, shape.device, seconds).times(name)
        else:
            # A call that waits for the device, as the exact mode of select_tokens does, is in no graph.
            calls = [workload.run for workload in workloads]
            found = time_graph(calls, shape.device, seconds) or time_kernels(calls[0], shape.device)
            assert found is not None
            times = found
    return Timing(median(times), spread(times))
