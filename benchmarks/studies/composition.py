"""What do methods save that compose with each other? First part: train them, in one call under ten minutes of a GPU.

    python3 -m benchmarks.studies.cifar10_gpu data --package DIR --out cifar10.npz
    python3 -m benchmarks.studies.composition --data cifar10.npz --out FOLDER
    python3 -m benchmarks.studies.composition_page --data cifar10.npz --trained FOLDER

A static DiT, DC-DiT, DyDiT, SparseDiT (pooled and routed) and DC-DiT with dynamic width learn from 12,000 images of
CIFAR-10 until each has spent the same training FLOPs. FOLDER gets the weights of the first seed and ``trained.json``:
the losses of all seeds on images that none has seen, and on a GPU the times of drawing. That needs no network. A study
that was stopped continues where it was. The second part (:mod:`benchmarks.studies.composition_page`) runs on a CPU.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.machine import cpu_name
from benchmarks.harness.static import CompiledDiT, choose_sdpa
from benchmarks.studies import cifar10
from benchmarks.studies.comparison import measure_runs
from benchmarks.studies.conversion import Side, measure_sides
from benchmarks.studies.training import RunFailedError, read_log, train_all
from dcdit.checkpoint import Model, list_checkpoints, load_model, save_model
from dcdit.config import TrainConfig, override
from dcdit.diffusion import create_objective
from dcdit.models import DCDiT, DyDiT, SlicedModel
from dcdit.sample.model_calls import ModelCalls

BASE = Path(__file__).with_suffix(".yaml")
ON_CPU = {"optim.device": "cpu", "optim.precision": "fp32", "optim.batch_size": 16, "optim.ema_decay": 0.99}
STATIC, DYNAMIC = "static", "dc-dit"
PATCHES = {**cifar10.COMMON, "hidden_size": 128, "depth": 7}
SPARSE = {**PATCHES, "modules": 1, "sparse_depth": 2}
CELLS = {**cifar10.COMMON, "hidden_size": 128, "depth": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    STATIC: ("DiT-S/2", PATCHES),
    DYNAMIC: ("DC-DiT-S", CELLS),
    "dydit": ("DyDiT-S/2", PATCHES),
    "sparsedit": ("SparseDiT-S/2", SPARSE),
    "sparsedit-routed": ("SparseDiT-S/2", {**SPARSE, "router": "predictability"}),
    "dc-dit-width": ("DC-DiT-S", {**CELLS, "dynamic_width": True}),
}
FLOPS = {"cuda": 4e14, "cpu": 3e13}
JOBS = {"cuda": 12, "cpu": 2}
COMPILED = "static, compiled"
BATCH = 256
"""Images of a pass whose loss is measured."""
GPU_IMAGES, GPU_COPIES, GPU_ROUNDS, GPU_SECONDS = 1000, 2, 5, 20


def configs(data: Path, runs: Path, flops: float, seeds: Sequence[int], device: str) -> dict[str, TrainConfig]:
    """Name of a run -> its configuration."""
    made = cifar10.configs(data, runs, flops, seeds, MODELS, BASE)
    return {name: override(config, ON_CPU if device == "cpu" else {}) for name, config in made.items()}


class Passes:
    """Forward passes of a trained model as it draws, one at each noise level.

    Args:
        model: in evaluation mode. The images go to its device.
        config: of its run.
        x0, y, noise: images that it has not seen, their labels, and what is added to the images.
    """

    def __init__(self, model: Model, config: TrainConfig, x0: Tensor, y: Tensor, noise: Tensor) -> None:
        self.objective = create_objective(config.diffusion.objective, model.config.learn_sigma)
        device = next(model.parameters()).device
        clean, added, self.y = x0.to(device), noise.to(device), y.to(device)
        self.noisy = [
            self.objective.noise(clean, self.objective.t_at(level, clean), added) for level in cifar10.NOISE_LEVELS
        ]
        self.model: Any = model
        if isinstance(model, DCDiT | DyDiT) and model.config.gate_shape is not None:
            self.model = SlicedModel(model, [float(noisy.time[0]) for noisy in self.noisy])

    def losses(self) -> tuple[Tensor, float]:
        """(levels, images), and the mean GFLOPs of a pass per image."""
        calls = ModelCalls(self.model, len(self.y))
        found = [self.objective.loss(calls(noisy.x, noisy.time, self.y), noisy)["loss"].cpu() for noisy in self.noisy]
        return torch.stack(found), fmean(record["gflops"] for record in calls.records())

    def side(self, model: Any = None, gflops: float | None = None) -> Side:
        """All passes as one call that is timed; of another form of the model if one is given."""
        inputs = [(noisy.x, float(noisy.time[0])) for noisy in self.noisy]
        return Side(self.model if model is None else model, self.y, inputs, gflops)


def held_out(config: TrainConfig, count: int, copies: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Images that no run trained on, their labels, and other noise for each copy of them: the same on every machine."""
    x0, y = cifar10.held_out(config, count)
    x0, y = x0.repeat(copies, 1, 1, 1), y.repeat(copies)
    return x0, y, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def measure(config: TrainConfig) -> dict[str, Any]:
    """Held-out loss and FLOPs of a trained model at each noise level, and the course of its run. In float32."""
    model = load_model(config.run.out).to(device_of(config))
    batches = zip(*(part.split(BATCH) for part in held_out(config, cifar10.HELD_OUT)), strict=True)
    losses, gflops = zip(*(Passes(model, config, *batch).losses() for batch in batches), strict=True)
    by_level = torch.cat(losses, 1).mean(1).tolist()
    return {
        **cifar10.run_facts(config),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "loss": {"drawn": fmean(by_level)},
        "loss_by_level": {"drawn": by_level},
        "gflops": {"drawn": fmean(gflops)},
        "course": read_log(config),
    }


def device_of(config: TrainConfig) -> torch.device:
    return torch.device("cpu" if config.optim.device == "cpu" else "cuda")


@torch.inference_mode()
def time_on_gpu(planned: Mapping[str, TrainConfig]) -> dict[str, Any]:
    """Times of the trained models in bfloat16. The first side is the static DiT in its fastest form."""
    sides: dict[str, Side] = {}
    for name, config in planned.items():
        model = load_model(config.run.out).to(device_of(config), torch.bfloat16)
        passes = Passes(model, config, *held_out(config, GPU_IMAGES, GPU_COPIES))
        side = passes.side()
        if name == STATIC:
            choose_sdpa(passes.model.config, len(passes.y), device_of(config), torch.bfloat16)
            sides[COMPILED] = passes.side(CompiledDiT(passes.model), side.gflops)
        sides[name] = side
    found = measure_sides(sides, GPU_ROUNDS, device_of(config), GPU_SECONDS)
    times = {name: side._asdict() for name, side in found.sides.items()}
    return {"images": len(passes.y), "conditions": found.conditions, "sides": times}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the file that `cifar10_gpu data` wrote")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--flops", type=float, help="training FLOPs of each run (default: 4e14, on a CPU 3e13)")
    parser.add_argument("--minutes", type=float, help="stop runs that take longer; the page tells what they spent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--jobs", type=int, help="runs trained at a time (default: 12, on a CPU 2)")
    parser.add_argument("--runs", type=Path, default=Path("out/composition"), help="folder of the training runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args(argv)
    planned = configs(args.data, args.runs, args.flops or FLOPS[args.device], args.seeds, args.device)
    if args.minutes:
        planned = {name: override(config, {"run.minutes": args.minutes}) for name, config in planned.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    failure = None
    try:
        train_all(planned, args.jobs or JOBS[args.device])
    except RunFailedError as error:  # the others are measured
        failure = error
    trained = {name: config for name, config in planned.items() if list_checkpoints(config.run.out)}
    first = {name: trained[run] for name in MODELS if (run := f"{name}-{args.seeds[0]}") in trained}
    for name, config in first.items():
        save_model(args.out / f"{name}.safetensors", load_model(config.run.out))
    torch.backends.cudnn.allow_tf32 = False  # losses are those of float32
    found = {
        "flops": args.flops or FLOPS[args.device],
        "minutes": args.minutes,
        "seeds": args.seeds,
        "batch": next(iter(planned.values())).optim.batch_size,
        "precision": next(iter(planned.values())).optim.precision,
        "machine": f"{cpu_name() if args.device == 'cpu' else torch.cuda.get_device_name()}, torch {torch.__version__}",
        "runs": measure_runs(trained, lambda _, config: measure(config)),
    }
    (args.out / "trained.json").write_text(json.dumps(found))
    if args.device == "cuda" and STATIC in first:
        found["gpu"] = time_on_gpu(first)
        (args.out / "trained.json").write_text(json.dumps(found))
    print(f"wrote {args.out / 'trained.json'}")
    if failure is not None:
        raise SystemExit(f"error: {failure}")


if __name__ == "__main__":
    main()
