"""Long runs that look for what a test of a few seconds misses, and print what they found as tables.

    python -m tools.soak [PART ...] [--out FILE]

Each part is a module of this package with a function ``run() -> Part``.
"""

import argparse
import importlib
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tools.soak.part import Part

PARTS = {
    "kills": "training and checkpoint writing, killed at random moments",
    "malformed": "malformed files, made and randomly damaged, given to the commands that read them",
    "operations": "random calls of every operation against the float64 definition",
}
"""Name of a module to what it does."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the page to this file")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that files are removed
    unknown = set(args.parts) - PARTS.keys()
    if unknown:
        parser.error(f"part {min(unknown)!r}; accepted: {', '.join(PARTS)}")
    pages, faults = [], 0
    for name in args.parts or PARTS:
        began = time.monotonic()
        part: Part = importlib.import_module(f"tools.soak.{name}").run()
        minutes = (time.monotonic() - began) / 60
        pages.append(f"## {name}\n\n{part.page}\n\n{part.faults} faults in {minutes:.0f} minutes.")
        print(f"\n{pages[-1]}\n", flush=True)
        faults += part.faults
    if args.out is not None:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
        conditions = (
            f"commit {commit}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
            f"{time.strftime('%F')}"
        )
        page = ["# Soak", f"`make soak` printed this: {conditions}.", *pages]
        args.out.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
