"""``dcdit profile``: does the compression of a DC-DiT become time? FLOPs and wall-clock against the static DiT."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dcdit.checkpoint import load_model
from dcdit.models import DCDiT, create_model
from dcdit.nn.stages import collect_stages
from dcdit.profiling.profile import advice, calibrate_router, profile, varied_latents

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dcdit profile``."""
    parser.add_argument("--model", default="DC-DiT-S", help="preset with random weights (default: %(default)s)")
    parser.add_argument("--checkpoint", help="profile a trained checkpoint instead of a preset")
    parser.add_argument("--image-size", type=int, default=256, help="pixels; presets work on a grid of an eighth of it")
    parser.add_argument("--batch", type=int, default=4, help="images per forward (default: %(default)s)")
    parser.add_argument(
        "--drop-fraction", type=float, nargs="+", default=[0.0, 0.3, 0.6], help="budgets to time (default: 0 0.3 0.6)"
    )
    parser.add_argument(
        "--keep", type=float, default=0.25, help="share that a preset's untrained router is calibrated to keep"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and tokens")
    parser.add_argument("--compile", action="store_true", help="torch.compile the static models and the convolutions")
    parser.add_argument("--seconds", type=float, default=2.0, help="timing budget per side (default: %(default)s)")
    parser.add_argument("--trace", help="also write a Chrome trace of one dynamic forward to this file")
    parser.add_argument("--out", default="out/profile", help="folder for profile.json and profile.png")


def run(args: argparse.Namespace) -> int:
    """Entry point of ``dcdit profile``."""
    from dcdit.profiling.plots import plot_profile

    device = _device(args.device)
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}; accepted: a positive number of images")
    if not args.seconds > 0:
        raise ValueError(f"--seconds is {args.seconds}; accepted: a positive number")
    torch.manual_seed(0)
    model, name = _model(args)
    model = model.to(device=device, dtype=DTYPES[args.dtype]).eval()
    config = model.config
    x = varied_latents(args.batch, config.in_channels, config.grid).to(device, DTYPES[args.dtype])
    t = torch.linspace(0, 999, args.batch, device=device).long()
    y = torch.arange(args.batch, device=device) % config.num_classes
    if not args.checkpoint:
        calibrate_router(model, x, t, y, args.keep)
    result = profile(model, name, x, t, y, args.drop_fraction, args.seconds, args.compile)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "profile.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    plot_profile(result, out / "profile.png")
    print(result.table(), result.stage_table(), *advice(result), sep="\n\n")
    if args.trace:
        _write_trace(lambda: model(x, t, y, drop_fraction=args.drop_fraction[0]), args.trace)
        print(f"\nwrote {args.trace}: open it in ui.perfetto.dev or chrome://tracing")
    print(f"\nwrote {out / 'profile.json'} and {out / 'profile.png'}")
    return 0


def _device(name: str) -> torch.device:
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device is {name!r}; accepted: cpu, cuda")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device is {name!r}, but no CUDA device is visible to PyTorch; accepted here: cpu")
    return torch.device(name)


def _model(args: argparse.Namespace) -> tuple[DCDiT, str]:
    if args.checkpoint:
        model: Any = load_model(args.checkpoint)
        name = Path(args.checkpoint).stem
    else:
        model, name = create_model(args.model, args.image_size), args.model
    if not isinstance(model, DCDiT):
        raise ValueError(f"{name} is a static DiT; accepted: a DC-DiT (its static counterparts are timed beside it)")
    return model, name


def _write_trace(work: Any, path: str) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    record = torch.profiler.profile(activities=activities)
    with torch.inference_mode(), record as recorded, collect_stages(torch.profiler.record_function):
        work()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(path)
