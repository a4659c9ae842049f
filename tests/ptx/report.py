"""What the compiled kernels of every operation do on one GPU, counted as their PTX runs on a CPU.

    python tests/ptx/report.py --capability 90 --width 1152 --grid 16 16 --batch 4

``bytes`` is what memory must move at least (the distinct 32-byte sectors read and written); ``traffic`` how often the
caches deliver that; ``used`` the share of the delivered bytes that lanes asked for; ``instr/kB`` the instructions of
warps per 1000 bytes moved; ``conflicts`` the passes through shared memory over those without bank conflicts.
"""

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from ptx.counts import SECTOR, Counts
from ptx.launch import Launcher
from tqdm import tqdm

from dcdit import ops
from dcdit.workloads import WORKLOADS, Shape, create_workload


def row(name: str, counts: Counts) -> list[str]:
    moved = counts.moved
    return [
        name,
        counts.kernel,
        f"{moved:,}",
        f"{SECTOR * counts.sectors / moved:.2f}",
        f"{counts.requested / (SECTOR * counts.sectors):.0%}",
        f"{1000 * counts.instructions / moved:.0f}",
        f"{counts.passes / counts.least_passes:.2f}" if counts.least_passes else "-",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, choices=[80, 90, 100], default=90)
    parser.add_argument("--width", type=int, default=1152, help="D")
    parser.add_argument("--grid", type=int, nargs=2, default=[16, 16])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.25, help="share of the tokens that is kept")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--op", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    args = parser.parse_args()
    shape = Shape(
        args.batch, tuple(args.grid), args.width, args.keep, getattr(torch, args.dtype), torch.device("cpu")
    )  # fmt: skip
    table = [["operation", "kernel", "bytes", "traffic", "used", "instr/kB", "conflicts"]]
    with pytest.MonkeyPatch.context() as monkeypatch:
        launcher = Launcher(args.capability, counted=True)
        launcher.install(monkeypatch)
        for name in tqdm(args.op, leave=False):
            workload = create_workload(name, shape)
            with ops.use_backend("triton"):
                workload.forward_backward() if workload.differentiable else workload.forward()
            table += [row(name, counts) for counts in launcher.counts]
            launcher.counts.clear()
    size = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(n) for cell, n in zip(line, size, strict=True)).rstrip())


if __name__ == "__main__":
    main()
