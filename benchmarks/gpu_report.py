"""One command for a rented GPU: checks, times, and a page, as much as the time allows.

    python3 benchmarks/gpu_report.py --minutes 9 --out FOLDER

needs no installation and no network: plain Python with torch, triton and pytest is enough. Run it from the root of the
repository. What is found is in FOLDER/lines.jsonl at once, one line per case, so a stop at any second loses only the
case that was running. A second call with the same FOLDER goes on where the first one stopped. The page report.md is
written at the end of a call, or from the lines alone, on any machine:

    python3 benchmarks/gpu_report.py --page --out FOLDER

--rehearse runs everything on a CPU with tiny models, to see that it works; its numbers mean nothing.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks.gpu.plan import GROUPS  # noqa: E402 (after the root is on the path)

PAGE_SECONDS = 12.0
"""Kept back of the time of a call for writing the page."""


def main(argv: Sequence[str] | None = None) -> int:
    names = [group.name for group in GROUPS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for this call (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--only", nargs="+", choices=names, default=[], metavar="GROUP", help=", ".join(names))
    parser.add_argument("--official", type=Path, help="checkout of AMD-AGI/DynamicChunkingDiT to time beside dcdit")
    parser.add_argument("--page", action="store_true", help="only write the page from the lines that are there")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU with tiny models")
    args = parser.parse_args(argv)
    began, folder = time.monotonic(), args.out.resolve()
    if args.minutes <= 0:
        parser.error(f"--minutes is {args.minutes:g}; accepted: above 0")
    if not args.page:
        import torch

        if not args.rehearse and not torch.cuda.is_available():
            print("gpu-report: no CUDA device is visible to PyTorch; nothing was run and nothing is claimed")
            return 0
        from dcdit.utils.files import claimed

        with claimed(folder):
            _run(args, folder, 60 * args.minutes - PAGE_SECONDS - (time.monotonic() - began))
    return subprocess.run([sys.executable, "-m", "benchmarks.gpu.page", str(folder)], cwd=ROOT).returncode


def _run(args: argparse.Namespace, folder: Path, seconds: float) -> None:
    from benchmarks.gpu.driver import Driver
    from benchmarks.gpu.lines import Lines
    from benchmarks.gpu.setting import device_name

    options = ["--rehearse"] if args.rehearse else []
    if args.official:
        options += ["--official", str(args.official.resolve())]
    lines = Lines(folder, device=device_name(args.rehearse))
    print(f"gpu-report: {lines.common['device']}, {seconds:.0f} s, lines in {lines.path}", flush=True)
    Driver(lines, seconds, options, args.only, say=lambda text: print(text, flush=True)).run()


if __name__ == "__main__":
    raise SystemExit(main())
