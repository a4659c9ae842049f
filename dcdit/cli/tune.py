"""``dcdit tune``: find launch configurations for this GPU and write them to the file that the kernels read first."""

import argparse
import json
from pathlib import Path

import torch

from dcdit.profiling.tune import Table, merged, report, tune
from dcdit.profiling.workloads import WORKLOADS, Shape
from dcdit.utils.files import write_text
from dcdit.utils.outputs import check_output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dcdit tune``."""
    add = parser.add_argument
    add(
        "--op",
        nargs="+",
        metavar="NAME",
        choices=WORKLOADS,
        default=list(WORKLOADS),
        help=f"operations to tune for (default: all): {', '.join(WORKLOADS)}",
    )
    add(
        "--width",
        nargs="+",
        type=int,
        metavar="D",
        default=[384, 768, 1152],
        help="token widths (default 384 768 1152)",
    )
    add("--batch", type=int, metavar="N", default=32, help="images (default %(default)s)")
    add("--side", type=int, metavar="N", default=32, help="side of the grid (default %(default)s, a 256 px latent)")
    add("--seconds", type=float, default=0.3, help="timing budget per candidate (default %(default)s)")
    add(
        "--out",
        metavar="FILE",
        help="JSON file to write (default: this GPU's in the user's cache, which is read first)",
    )


def run(args: argparse.Namespace) -> int:
    """Entry point of ``dcdit tune``."""
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device is visible to PyTorch; tuning times kernels on one")
    from dcdit.kernels.launch import device_slug, read_configs, user_config_folder

    device = torch.device("cuda", torch.cuda.current_device())
    out = Path(args.out) if args.out else user_config_folder() / f"{device_slug(device)}.json"
    check_output_file(out)
    earlier = read_configs(out) if out.is_file() else {}
    shapes = [Shape(args.batch, (args.side, args.side), d, 0.25, torch.bfloat16, device) for d in args.width]

    def save(table: Table) -> None:
        write_text(out, json.dumps(merged(earlier, table), indent=2) + "\n")

    table = tune(args.op, shapes, args.seconds, save)
    save(table)
    print(report(table))
    print(f"\n{out}")
    return 0
