"""All benchmarks in one command, the most important first: `python -m benchmarks.harness.suite [--minutes M]`.

`make bench` runs it; for a rented GPU there is benchmarks/gpu_report.py. Each part is a process of its own and writes
its results when it ends. The page is written again after every part, so an interruption loses the current part only. A
part that runs out of time skips the rest of its benchmarks, and the page says so.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.report import read, write

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "models": (0.45, ["-m", "pytest", "-q", "benchmarks/bench_models.py", "--benchmark-only"]),
    "ops": (0.35, ["-m", "pytest", "-q", "benchmarks/bench_ops.py", "--benchmark-only"]),
    "scaling": (0.2, ["-m", "benchmarks.bench_scaling", "--seconds", "0.3"]),
}
"""Fraction of the time, and command, of each part."""
GRACE = 20.0
"""Seconds that a part may take after its deadline, to finish a benchmark and write."""


def run_parts(minutes: float, raw: Path, results: Path) -> int:
    """Run every part within a time limit, and write the page after each.

    Returns:
        The number of parts that failed.
    """
    end = time.monotonic() + 60 * minutes
    raw.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    failed = 0
    left = sum(fraction for fraction, _ in PARTS.values())
    for name, (fraction, command) in PARTS.items():
        seconds = (end - time.monotonic()) * fraction / left
        left -= fraction
        out = raw / f"{name}.json"
        out.unlink(missing_ok=True)
        target = [f"--benchmark-json={out}"] if "pytest" in command else [f"--out={out}"]
        environment = {**os.environ, "DCDIT_BENCH_SECONDS": f"{max(1.0, seconds - GRACE):.0f}"}
        print(f"bench: {name}, {seconds:.0f} s", flush=True)
        try:
            code = subprocess.run(
                [sys.executable, *command, *target], cwd=ROOT, env=environment, timeout=max(1.0, seconds)
            ).returncode
        except subprocess.TimeoutExpired:
            code = 1
            print(f"bench: {name} ran out of time", flush=True)
        failed += code != 0
        if out.is_file() and out.stat().st_size:
            written.append(out)
            print(f"bench: wrote {write(read(written), results)}", flush=True)
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="for everything (default: %(default)s)")
    parser.add_argument("--raw", type=Path, default=ROOT / "out" / "bench", help="folder for raw JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the page")
    args = parser.parse_args(argv)
    return 1 if run_parts(args.minutes, args.raw.resolve(), args.out) else 0


if __name__ == "__main__":
    raise SystemExit(main())
