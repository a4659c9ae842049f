"""Time per position of every operation as the grid grows: `python -m benchmarks.bench_scaling --out scaling.json`.

A batch of small grids has as many images as make the same number of positions as one large grid, so that caches and
fixed costs weigh the same. What differs is the cost of one image: a constant time per position is a cost linear in L.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness import sets
from benchmarks.harness.machine import machine
from dcdit.profiling.rounds import spread
from dcdit.profiling.timing import time_rounds
from dcdit.profiling.workloads import WORKLOADS, Shape, create_workload

SIDES = (16, 32, 64, 128, 256)


def measure(name: str, sides: Sequence[int], width: int, keep: float, seconds: float) -> list[dict[str, Any]]:
    """Nanoseconds per position of an operation at each grid, forward, and forward with backward.

    Args:
        name: of the workload.
        sides: of square grids.
        width: D.
        keep: fraction of the tokens that is kept.
        seconds: timing budget per point.

    Raises:
        ValueError: no sides, or a side that is not positive.
    """
    if not sides or min(sides) < 1:
        raise ValueError(f"sides is {list(sides)}; accepted: one or more positive grid sides")
    rows = []
    for direction in sets.directions(WORKLOADS[name]):
        calls, positions = {}, {}
        for side in sides:
            images = max(sides) ** 2 // side**2
            shape = Shape(images, (side, side), width, keep, sets.dtype(), sets.device())
            workload = create_workload(name, shape)
            calls[str(side)] = workload.forward if direction == "forward" else workload.forward_backward
            positions[str(side)] = images * side**2
        rounds = time_rounds(calls, sets.device(), seconds * len(calls), warmup=1, least=3)
        times = {side: rounds.times(side) for side in calls}
        ns = {side: 1e6 * median(ms) / positions[side] for side, ms in times.items()}
        spreads = {side: spread(ms) for side, ms in times.items()}
        row = {"op": name, "direction": direction, "width": width, "keep": keep}
        rows.append({**row, "ns_per_position": ns, "spread": spreads})
        shown = ", ".join(f"{side}: {n:.1f} ns ±{spreads[side]:.0%}" for side, n in ns.items())
        print(f"{name} {direction}: {shown}", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--side", nargs="+", type=int, default=list(SIDES), help="grid sides (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="D (default: %(default)s)")
    parser.add_argument("--keep", type=float, default=0.25, help="kept fraction (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1.0, help="timing budget per point (default: %(default)s)")
    parser.add_argument("--out", default="out/bench/scaling.json", help="file to write (default: %(default)s)")
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in args.op:  # written after each, so that no measurement is lost
        rows += measure(name, args.side, args.width, args.keep, args.seconds)
        out.write_text(json.dumps({"dcdit": {**machine(), "left_out": {}}, "scaling": rows}, indent=1) + "\n")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    raise SystemExit(main())
