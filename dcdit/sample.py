"""``dcdit sample``: pictures from a checkpoint at one or more drop fractions, and what the router kept on the way."""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit._vae import latent_range, load_autoencoder
from dcdit.checkpoint import Model, load_model, read_metadata
from dcdit.diffusion import METHODS, sample
from dcdit.models import DCDiT

DEFAULT_METHOD = {"dit": "ddpm", "flow": "heun"}


class KeptShares:
    """A dynamic model that notes the share of tokens it keeps in each call; passes for the model in a sampler.

    Args:
        model: called with ``return_routing=True``.
        images: rows of a batch that are conditional; further rows are the unconditional branch of guidance.
    """

    def __init__(self, model: DCDiT, images: int) -> None:
        self.config, self.model, self.images = model.config, model, images
        self.calls: list[dict[str, Tensor]] = []

    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor, drop_fraction: float | Tensor = 0.0, budget: int | None = None
    ) -> Tensor:
        out, routing = self.model(x, t, y, drop_fraction, budget, return_routing=True)
        kept, natural = routing.mask.float().mean(1), routing.natural_mask.float().mean(1)
        call = {"t": t[0], "kept": kept[: self.images].mean(), "natural": natural[: self.images].mean()}
        if len(kept) > self.images:
            call["kept_null"] = kept[self.images :].mean()
        self.calls.append(call)
        return out

    def records(self) -> list[dict[str, float]]:
        """One entry per model call: time ``t``, shares ``kept`` and ``natural`` (before dropping), ``kept_null``."""
        return [{name: float(value) for name, value in call.items()} for call in self.calls]


# --- command line ---------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="run or checkpoint folder, .safetensors file, or official .pt",
    )
    add("--no-ema", action="store_true", help="take the last weights instead of the averaged ones")
    add(
        "--drop-fraction",
        type=float,
        nargs="+",
        metavar="RHO",
        help="share of kept tokens to drop, in [0, 1); one picture each",
    )
    add("--null-drop-fraction", type=float, metavar="RHO", help="another one for the unconditional branch (Lite-CFG)")
    add("--budget", type=int, metavar="K", help="keep exactly K tokens per image instead")
    add("--labels", type=int, nargs="+", metavar="N", help="classes to draw (default: all, at most 16)")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--num-per-class", type=int, default=1, metavar="N", help="images of each label (default 1)")
    count.add_argument("--num", type=int, metavar="N", help="images in all, labels taking turns")
    add("--steps", type=int, default=250, help="sampling steps (default 250)")
    add("--method", choices=METHODS, help="default: ddpm, or heun for a model trained with the flow objective")
    add("--cfg-scale", type=float, default=1.0, metavar="S", help="classifier-free guidance; 1 is none (default 1)")
    add("--seed", type=int, default=0, help="fixes the noise; all drop fractions share it (default 0)")
    add("--batch-size", type=int, default=16, metavar="N", help="images per forward pass (default 16)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="dtype of the weights (default fp32)")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto takes a GPU if there is one (default auto)")
    add(
        "--vae",
        metavar="DIR",
        help="local diffusers AutoencoderKL that turns latents into pixels; without it they go to .npz",
    )
    add("--individual", action="store_true", help="also write every image as its own PNG")
    add(
        "--out",
        default="out/samples",
        metavar="DIR",
        help="where the pictures and samples.json go (default out/samples)",
    )


def run(args: argparse.Namespace) -> None:
    _check_counts(args)
    gpu = args.device == "auto" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    model = load_model(args.checkpoint, ema=not args.no_ema).to(device)
    if args.precision == "bf16":
        model = model.bfloat16()
    decode = _decoder(args.vae, model, device)
    labels = _labels(args, model)
    method = args.method or DEFAULT_METHOD[read_metadata(args.checkpoint, not args.no_ema).get("objective", "dit")]
    fractions = _fractions(args, model)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "checkpoint": str(args.checkpoint),
        "model": {"architecture": type(model).__name__, **model.config.to_dict()},
        "method": method,
        **{name: getattr(args, name) for name in ("steps", "cfg_scale", "seed", "precision", "budget", "batch_size")},
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "labels": labels.tolist(),
        "runs": [],
    }
    for rho in fractions:
        began = time.perf_counter()
        x, calls = _draw(args, model, labels.to(device), method, rho)
        seconds = time.perf_counter() - began
        files = _write(args, out, decode, x, labels, "samples" if rho is None else f"drop_{rho:g}")
        kept = {"kept": _mean(calls, "kept"), "natural": _mean(calls, "natural")} if calls else {}
        report["runs"].append({"drop_fraction": rho, "seconds": seconds, "files": files, **kept, "calls": calls})
        share = f", kept {kept['kept']:.1%} of the tokens" if kept else ""
        print(f"{files[0]}: {len(labels)} images{share}")
    (out / "samples.json").write_text(json.dumps(report, indent=2), encoding="utf-8")


def _draw(
    args: argparse.Namespace, model: Model, labels: Tensor, method: str, rho: float | None
) -> tuple[Tensor, list[dict[str, float]]]:
    """Samples (N, C, H, W) and, for a dynamic model, what each model call kept, averaged over the batches."""
    images, calls = [], []
    for first in range(0, len(labels), args.batch_size):
        batch = labels[first : first + args.batch_size]
        watched: Any = KeptShares(model, len(batch)) if isinstance(model, DCDiT) else model
        images.append(
            sample(
                watched,
                batch,
                args.steps,
                method,
                cfg_scale=args.cfg_scale,
                drop_fraction=rho if rho is None or args.null_drop_fraction is None else (rho, args.null_drop_fraction),
                budget=args.budget,
                clip=model.config.in_channels == 3 and method in ("ddpm", "ddim"),
                seed=args.seed,
                first_index=first,
            )
        )
        calls.append((len(batch), watched.records() if isinstance(watched, KeptShares) else []))
    total = len(labels)
    means = [
        {name: sum(count * call[name] for (count, _), call in zip(calls, row, strict=True)) / total for name in row[0]}
        for row in zip(*(records for _, records in calls), strict=True)
    ]
    return torch.cat(images), means


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

    from dcdit.pictures import grid, to_pixels

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


def _decoder(vae: str | None, model: Model, device: torch.device) -> Callable[[Tensor], Tensor] | None:
    """From samples to (B, 3, H, W) in [-1, 1]; None where samples are latents and nothing decodes them."""
    if vae is None:
        return (lambda x: x) if model.config.in_channels == 3 else None
    autoencoder = load_autoencoder(vae, device)
    channels = autoencoder.config.latent_channels
    if channels != model.config.in_channels:
        raise ValueError(f"{vae} decodes {channels} channels; the model makes {model.config.in_channels}")
    shift, scale = latent_range(autoencoder)

    @torch.no_grad()
    def decode(x: Tensor) -> Tensor:
        return autoencoder.decode(x.float() / scale + shift).sample

    return decode


def _fractions(args: argparse.Namespace, model: Model) -> list[float | None]:
    """One run per fraction; None leaves the option out."""
    given = args.drop_fraction
    for rho in [*(given or ()), *([] if args.null_drop_fraction is None else [args.null_drop_fraction])]:
        if not 0 <= rho < 1:
            raise ValueError(f"drop_fraction is {rho}; accepted: a number in [0, 1)")
    wanted = given is not None or args.null_drop_fraction is not None
    if wanted and not isinstance(model, DCDiT):
        raise ValueError(
            f"{args.checkpoint} holds a static {type(model).__name__}, which drops no tokens; leave --drop-fraction out"
        )
    if wanted and args.budget is not None:
        raise ValueError(
            f"--budget {args.budget} fixes the kept tokens; leave --drop-fraction and --null-drop-fraction out"
        )
    positions = math.prod(model.config.grid)
    if args.budget is not None and not 1 <= args.budget <= positions:
        raise ValueError(f"budget is {args.budget}; accepted: 1 to {positions}, the positions of an image")
    if isinstance(model, DCDiT) and args.budget is None:
        return list(given or [0.0])
    return [None]


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
