"""``dcdit sample``: pictures from a checkpoint at one or more budgets, and what the router kept on the way."""

import argparse
import importlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit.checkpoint import Model, load_model, read_metadata
from dcdit.cli.sampling_options import add_sampling_options
from dcdit.data.autoencoder import create_decoder
from dcdit.diffusion import Step, sample
from dcdit.diffusion.guidance import Fraction
from dcdit.sample.model_calls import ModelCalls, Record, RoutingMap, mean_records, tflops_per_image
from dcdit.sample.plan import check_budget, device_name, guidance_of, make_plans

DEFAULT_METHOD = {"dit": "ddpm", "flow": "heun"}


@dataclass
class Drawn:
    """What came of a plan."""

    x: Tensor
    """(N, C, H, W) on the device."""
    calls: list[Record]
    """Of each model call, averaged over the images."""
    maps: list[RoutingMap]
    """How the router saw the first image at each call, if asked for."""
    expected: dict[float, Tensor]
    """Time of a step to the first image (C, H, W) that the model expected there, if asked for."""


# --- command line ---------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="run or checkpoint folder, .safetensors file, or official .pt",
    )
    add_sampling_options(add, budgets="+")
    add(
        "--target-flops",
        type=float,
        metavar="TFLOPS",
        help="choose the drop fraction that spends so many TFLOPs per image over the whole run",
    )
    add(
        "--target-latency",
        type=float,
        metavar="SECONDS",
        help="choose the drop fraction that takes so many seconds per image, decoding not counted",
    )
    add("--profile", metavar="JSON", help="a profile.json to choose by, instead of a short pilot run here")
    add("--labels", type=int, nargs="+", metavar="N", help="classes to draw (default: all, at most 16)")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--num-per-class", type=int, default=1, metavar="N", help="images of each label (default 1)")
    count.add_argument("--num", type=int, metavar="N", help="images in all, labels taking turns")
    add("--seed", type=int, default=0, help="fixes the noise; all drop fractions share it (default 0)")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto takes a GPU if there is one (default auto)")
    add("--individual", action="store_true", help="also write every image as its own PNG")
    add("--report", action="store_true", help="also write report.md: what was kept over time, FLOPs, boundary maps")
    add(
        "--out",
        default="out/samples",
        metavar="DIR",
        help="where the pictures (latents without --vae: .npz) and samples.json go (default out/samples)",
    )


def run(args: argparse.Namespace) -> None:
    _check_counts(args)
    gpu = args.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    model = load_model(args.checkpoint, ema=not args.no_ema).to(device)
    if args.precision == "bf16":
        model = model.bfloat16()
    notes = read_metadata(args.checkpoint, ema=not args.no_ema)
    decode = create_decoder(args.vae, model.config.in_channels, device, notes)
    labels = _labels(args, model)
    method = args.method or DEFAULT_METHOD[notes.get("objective", "dit")]
    check_budget(args, model)
    if args.report:
        importlib.import_module("matplotlib")  # missed before the work, not after it
    plans = make_plans(args, model, labels.to(device), method, _clips(model, method))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "checkpoint": str(args.checkpoint),
        "model": {"architecture": type(model).__name__, **model.config.to_dict()},
        "method": method,
        **{name: getattr(args, name) for name in ("steps", "cfg_scale", "cfg_interval", "null_drop_fraction")},
        **{name: getattr(args, name) for name in ("seed", "precision", "budget", "batch_size")},
        "device": device_name(device),
        "labels": labels.tolist(),
        "runs": [],
    }
    traces = []
    for plan in plans:
        began = time.perf_counter()
        drawn = _draw(args, model, labels.to(device), method, plan.drop)
        seconds = time.perf_counter() - began
        files = _write(args, out, decode, drawn.x, labels, plan.name)
        kept: dict[str, Any] = {
            name: _mean(drawn.calls, name) for name in ("kept", "natural") if name in drawn.calls[0]
        }
        tflops = tflops_per_image(drawn.calls)
        told: dict[str, Any] = {"name": plan.name, **plan.told, "files": files, **kept, "tflops_per_image": tflops}
        told |= {"seconds": seconds, "seconds_per_image": seconds / len(labels), "calls": drawn.calls}
        report["runs"].append(told)
        traces.append((drawn.maps, drawn.expected))
        share = f", kept {kept['kept']:.1%} of the tokens" if kept else ""
        each = f"{tflops:.4g} TFLOPs and {seconds / len(labels):.3g} s per image"
        print(f"{files[0]}: {len(labels)} images{share}, {each}")
    (out / "samples.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    if args.report:
        from dcdit.sample.report import write_report

        print(f"wrote {write_report(out, report, traces, decode)}")


def _draw(args: argparse.Namespace, model: Model, labels: Tensor, method: str, drop: Fraction | None) -> Drawn:
    images, calls = [], []
    expected: dict[float, Tensor] = {}
    maps: list[RoutingMap] = []

    def note(step: Step) -> None:
        expected[step.t] = step.x0[0]

    null = args.null_drop_fraction
    both = drop if drop is None or null is None else (drop, null)
    for first in range(0, len(labels), args.batch_size):
        batch = labels[first : first + args.batch_size]
        shown = args.report and first == 0
        watched = ModelCalls(model, len(batch), maps=shown)
        images.append(
            sample(
                watched,
                batch,
                args.steps,
                method,
                cfg_scale=args.cfg_scale,
                cfg_interval=guidance_of(args).interval,
                drop_fraction=both,
                budget=args.budget,
                clip=_clips(model, method),
                seed=args.seed,
                first_index=first,
                callback=note if shown else None,
            )
        )
        calls.append((len(batch), watched.records()))
        maps = maps or watched.maps()
    return Drawn(torch.cat(images), mean_records(calls), maps, expected)


def _clips(model: Model, method: str) -> bool:
    """Pixels have known bounds, latents have not."""
    return model.config.in_channels == 3 and method in ("ddpm", "ddim")


def _mean(calls: list[dict[str, float]], name: str) -> float:
    return sum(call[name] for call in calls) / len(calls)


def _write(
    args: argparse.Namespace, out: Path, decode: Callable[[Tensor], Tensor] | None, x: Tensor, labels: Tensor, name: str
) -> list[str]:
    """The files written: the grid first, or the latents where there is no decoder."""
    if decode is None:
        np.savez(out / f"{name}.npz", latents=x.float().cpu().numpy(), labels=labels.numpy())
        return [str(out / f"{name}.npz")]
    from PIL import Image

    from dcdit.utils.images import grid, to_pixels

    pixels = to_pixels(torch.cat([decode(batch) for batch in x.split(args.batch_size)]))
    columns = args.num_per_class if args.num is None and args.num_per_class > 1 else math.ceil(len(pixels) ** 0.5)
    files = [out / f"{name}.png"]
    grid(pixels, columns).save(files[0])
    if args.individual:
        (out / name).mkdir(exist_ok=True)
        for index, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            files.append(out / name / f"{index:05d}_class{label}.png")
            Image.fromarray(image).save(files[-1])
    return [str(file) for file in files]


def _labels(args: argparse.Namespace, model: Model) -> Tensor:
    classes = model.config.num_classes
    chosen = args.labels or list(range(min(classes, 16)))
    for label in chosen:
        if not 0 <= label < classes:
            raise ValueError(f"label {label}; accepted: 0 to {classes - 1}")
    if args.num is not None:
        return torch.tensor([chosen[i % len(chosen)] for i in range(args.num)])
    return torch.tensor(chosen).repeat_interleave(args.num_per_class)


def _check_counts(args: argparse.Namespace) -> None:
    for name in ("num_per_class", "num", "steps", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; accepted: at least 1")
