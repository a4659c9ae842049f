"""``dcdit profile``: do the saved FLOPs of a model become time? FLOPs and wall-clock against the static DiT."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dcdit.checkpoint import load_model, model_file
from dcdit.cli.extras import is_installed, missing
from dcdit.cli.options import add_device_option, check_counts, check_number
from dcdit.config import load_config
from dcdit.models import DCDiT, DiT, DyDiT, create_model
from dcdit.nn.memory_format import channels_last
from dcdit.profiling.calibrate import calibrate_gates, calibrate_router, varied_latents
from dcdit.profiling.plots import plot_profile
from dcdit.profiling.profile import LEAST_ROUNDS, advice, profile, write_trace
from dcdit.profiling.subject import DynamicModel, Subject
from dcdit.utils.environment import resolve_device
from dcdit.utils.files import write_text
from dcdit.utils.outputs import check_not_read, check_output_file, check_output_folder, check_own

RECORD, PICTURE = "profile.json", "profile.png"
MIDDLE = 500
"""Timestep of the models that are timed at one."""
IMAGE_SIZE = 256
PIXELS = ("digits", "photographs", "folder")
"""Kinds of data whose images are the model's input, so that a recipe says its grid: ``data.size`` squared."""
MOST_IMAGES, MOST_SECONDS = 65_536, 86_400
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    subject = parser.add_mutually_exclusive_group()
    subject.add_argument(
        "--model", metavar="NAME", default="DC-DiT-S", help="preset with random weights (default %(default)s)"
    )
    subject.add_argument(
        "--config", metavar="NAME", help="the model of a recipe (dcdit train --list-configs) with random weights"
    )
    subject.add_argument("--checkpoint", metavar="PATH", help="a trained model: run or checkpoint folder, or file")
    add(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="of a model with random weights, whose grid is an eighth of it (default: that of the recipe, or 256)",
    )
    add("--batch", type=int, metavar="N", default=4, help="images per forward (default %(default)s)")
    add(
        "--drop-fraction",
        type=float,
        nargs="+",
        metavar="RHO",
        help="drop fractions of a DC-DiT to time (default 0 0.3 0.6)",
    )
    add(
        "--keep",
        type=float,
        metavar="SHARE",
        default=0.25,
        help="with random weights, share of the tokens that a DC-DiT keeps, and of the gates of dynamic width that are "
        "open (default 0.25)",
    )
    add_device_option(add)
    add("--dtype", choices=DTYPES, default="float32", help="of weights and tokens (default %(default)s)")
    add("--compile", action="store_true", help="torch.compile the static models and the convolutions")
    add("--graph", action="store_true", help="time CUDA graphs of all models")
    add("--seconds", type=float, default=2.0, help="longest timing per variant (default %(default)s)")
    add("--trace", metavar="FILE", help="also write a Chrome trace of one dynamic forward to this file")
    add("--out", metavar="DIR", default="out/profile", help="for profile.json and profile.png (default %(default)s)")


def run(args: argparse.Namespace) -> None:
    device = resolve_device(args.device)
    check_counts(args, "batch", most=MOST_IMAGES)
    check_number("--seconds", args.seconds, at_most=MOST_SECONDS)
    check_number("--keep", args.keep, at_most=1)
    for rho in args.drop_fraction or ():
        if not 0 <= rho < 1:
            raise ValueError(f"--drop-fraction is {rho}; accepted: numbers in [0, 1)")
    out = Path(args.out)
    _check_outputs(args, out)
    torch.manual_seed(0)
    model, name = _model(args)
    model = model.to(device=device, dtype=DTYPES[args.dtype]).eval()
    config = model.config
    x = varied_latents(args.batch, config.in_channels, config.grid).to(device, DTYPES[args.dtype])
    if isinstance(model, DCDiT) and config.gate_shape is None:
        t = torch.linspace(0, 999, args.batch, device=device).long()
    else:  # as in drawing, where all images of a call have the same timestep
        t = torch.full((args.batch,), MIDDLE, device=device)
    drops = args.drop_fraction or ([0.0, 0.3, 0.6] if isinstance(model, DCDiT) else [0.0])
    y = torch.arange(args.batch, device=device) % config.num_classes
    if not args.checkpoint and isinstance(model, DCDiT):
        calibrate_router(model, x, t, y, args.keep)
    if not args.checkpoint and isinstance(model, DCDiT | DyDiT) and config.gate_shape is not None:
        calibrate_gates(model, x, y, args.keep, range(0, 1000, 20))
    if sys.stderr.isatty():
        print(f"timing at least {LEAST_ROUNDS} rounds; a large model takes minutes on a CPU", file=sys.stderr)
    result = profile(model, name, x, t, y, drops, args.seconds, args.compile, args.graph)
    write_text(out / RECORD, json.dumps(asdict(result), indent=2) + "\n")
    pictures = is_installed("matplotlib")
    if pictures:
        plot_profile(result, out / PICTURE)
    parts = [result.caution(), result.conditions(), result.table(), result.stage_table(), *advice(result)]
    print(*filter(None, parts), sep="\n\n")
    if args.trace:
        write_trace(Subject(model, x, t, y).call(drops[0]), args.trace)
        print(f"\nwrote {args.trace}: open it in ui.perfetto.dev or chrome://tracing")
    print(f"\nwrote {out / RECORD}" + (f" and {out / PICTURE}" if pictures else ""))
    if not pictures:
        print(f"left out {PICTURE}, because {missing('matplotlib', 'profile')}")


def _check_outputs(args: argparse.Namespace, out: Path) -> None:
    check_output_folder(out)
    check_own(out, RECORD, ("model", "variants"), (PICTURE,))
    if args.trace:
        check_output_file(Path(args.trace))
        check_not_read(Path(args.trace), {"--checkpoint": args.checkpoint and model_file(args.checkpoint)})


def _model(args: argparse.Namespace) -> tuple[DynamicModel, str]:
    if args.checkpoint:
        model: Any = load_model(args.checkpoint)
        name = Path(args.checkpoint).stem
    elif args.config:
        config = load_config(args.config)
        section, shape = config.model, {}
        size = args.image_size or section.image_size
        if size is None and config.data.kind in PIXELS:
            shape = {"grid": (config.data.size, config.data.size), "in_channels": 3}
        sizes = {"image_size": size or IMAGE_SIZE, "num_classes": section.num_classes or 1000, **shape}
        model, name = create_model(section.name, **{**sizes, **section.overrides}), Path(args.config).stem
    else:
        model, name = create_model(args.model, args.image_size or IMAGE_SIZE), args.model
    if isinstance(model, DiT):
        called = args.checkpoint or name
        raise ValueError(
            f"{called} is a static DiT; accepted: a DC-DiT, a DyDiT or a SparseDiT (its static counterparts are timed "
            "beside it)"
        )
    return channels_last(model), name
