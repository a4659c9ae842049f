"""What the compiled kernels of every operation do on one GPU, counted as their PTX runs on a CPU.

    python -m tools.ptx.report --capability 90 --width 1152 --grid 16 16 --batch 4

``bytes``: what memory must move at least, the distinct 32-byte sectors read and written. ``instructions``: of warps.
``instr/kB``: instructions for each 1000 bytes. ``traffic``: how often the caches deliver those bytes. ``used``: the
part of the delivered bytes that lanes asked for. ``conflicts``: passes through shared memory over those without bank
conflicts.
"""

import argparse

import pytest
import torch
from tqdm import tqdm

from dcdit import ops
from dcdit.profiling.workloads import WORKLOADS, Shape, create_workload
from tools.columns import columns
from tools.ptx.counts import SECTOR, Counts
from tools.ptx.launch import Launcher


def row(name: str, counts: Counts) -> list[str]:
    moved = counts.moved
    return [
        name,
        counts.kernel,
        f"{moved:,}",
        f"{counts.instructions:,}",
        f"{1000 * counts.instructions / moved:.0f}",
        f"{SECTOR * counts.sectors / moved:.2f}",
        f"{counts.requested / (SECTOR * counts.sectors):.0%}",
        f"{counts.passes / counts.least_passes:.2f}" if counts.least_passes else "-",
    ]


def total(name: str, launches: list[Counts]) -> list[str]:
    moved, instructions = sum(c.moved for c in launches), sum(c.instructions for c in launches)
    return [name, "all", f"{moved:,}", f"{instructions:,}", f"{1000 * instructions / moved:.0f}", "", "", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, choices=[80, 90, 100], default=90)
    parser.add_argument("--width", type=int, default=1152, help="D")
    parser.add_argument("--grid", type=int, nargs=2, default=[16, 16])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.25, help="fraction of the tokens that is kept")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--op", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    args = parser.parse_args()
    shape = Shape(
        args.batch, tuple(args.grid), args.width, args.keep, getattr(torch, args.dtype), torch.device("cpu")
    )  # fmt: skip
    table = [["operation", "kernel", "bytes", "instructions", "instr/kB", "traffic", "used", "conflicts"]]
    with pytest.MonkeyPatch.context() as monkeypatch:
        launcher = Launcher(args.capability, counted=True)
        launcher.install(monkeypatch)
        for name in tqdm(args.op, leave=False):
            workload = create_workload(name, shape)
            with ops.use_backend("triton"):
                workload.run()
            table += [row(name, counts) for counts in launcher.counts]
            table.append(total(name, launcher.counts))
            launcher.counts.clear()
    print(columns(table))


if __name__ == "__main__":
    main()
