"""What do methods save that compose with each other? Second part: time the trained models on a CPU, and write the page.

``python -m benchmarks.studies.composition_page --data FILE --trained FOLDER`` reads what
:mod:`benchmarks.studies.composition` left in FOLDER. The models of the first seed are timed in turns on one thread, and
TeaCache, which is not trained, is laid over the DC-DiT. The page tells the held-out losses beside FLOPs and times.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.harness.machine import cpu_name
from benchmarks.studies import caching, cifar10
from benchmarks.studies.comparison import Results, by_way, loss_table, spread_text, write_study
from benchmarks.studies.composition import COMPILED, DYNAMIC, MODELS, Passes, configs, held_out
from benchmarks.studies.conversion import Side, SideTime, SideTimes, measure_sides, side_table
from dcdit.checkpoint import load_model
from dcdit.integrations.diffusers import DCDiTPipeline
from dcdit.profiling.plots import new_figure, plain_ticks
from dcdit.utils.tables import markdown_table

CPU_IMAGES = 8
CACHED_IMAGES, CACHED_STEPS, SCALE = 2, 24, 2.0


@torch.inference_mode()
def time_on_cpu(data: Path, trained: Path, rounds: int) -> SideTimes:
    """The first of the sides is the static DiT, which eta compares with."""
    planned = configs(data, trained, 1.0, [0], "cpu")  # only the data and the objective are read
    sides: dict[str, Side] = {}
    for name in MODELS:
        config = planned[f"{name}-0"]
        model = load_model(trained / f"{name}.safetensors")
        sides[name] = Passes(model, config, *held_out(config, CPU_IMAGES)).side()
    return measure_sides(sides, rounds)


def cache(weights: Path, rounds: int) -> str:
    """The table of TeaCache over a DC-DiT."""
    pipe = DCDiTPipeline.from_dcdit(weights)
    pipe.set_progress_bar_config(disable=True)
    rows = caching.study(pipe, CACHED_IMAGES, CACHED_STEPS, rounds, SCALE, caches=["TeaCache"])
    lines = []
    for row in rows:
        time = median(row.times)
        taken = f"{time:.2f} ({min(row.times):.2f} to {max(row.times):.2f})"
        fewer = f"{row.steps_error:.3f} ({row.steps} steps)"
        shares = f"{row.left_out:.0%}", f"{row.flops:.2f}", taken, f"{row.flops / time:.2f}"
        lines.append([row.setting, *shares, f"{row.error:.3f}", fewer])
    head = ["", "left out", "FLOPs", "time", "eta", "error", "error of fewer steps"]
    return markdown_table(head, lines)


def summary(results: Results, cpu: SideTimes, gpu: Mapping[str, Any] | None) -> str:
    """A row for each method: what it costs and how well it does."""
    rows = []
    for way, runs in by_way(results).items():
        gflops = fmean(run["gflops"]["drawn"] for run in runs)
        side, on_gpu = cpu.sides[way], SideTime(**gpu["sides"][way]) if gpu else None
        rows.append(
            [
                way,
                f"{gflops:.2f}",
                spread_text([run["loss"]["drawn"] for run in runs]),
                f"{_ms(side):.1f}",
                f"{side.eta:.2f}",
                f"{on_gpu.clock_eta[0]:.2f}" if on_gpu else "",
            ]
        )
    return markdown_table(["", "GFLOPs/image", "held-out loss", "CPU ms/image", "eta, CPU", "eta, GPU"], rows)


def plot(results: Results, cpu: SideTimes, path: Path) -> None:
    """Held-out loss over training FLOPs, over the FLOPs of drawing, and over its time."""
    figure, axes = new_figure(1, 3, figsize=(15, 4.4))
    for number, (way, runs) in enumerate(by_way(results).items()):
        color = f"C{number}"
        for run in runs:
            spent = {record["step"]: record["flops"] / 1e12 for record in run["course"] if "flops" in record}
            course = [
                (spent[record["step"]], record["val_loss_ema"])
                for record in run["course"]
                if "val_loss_ema" in record and record["step"] in spent
            ]
            if course:
                axes[0].plot(*zip(*course, strict=True), color=color, lw=1)
        losses = [run["loss"]["drawn"] for run in runs]
        places = fmean(run["gflops"]["drawn"] for run in runs), _ms(cpu.sides[way])
        for axis, place in zip(axes[1:], places, strict=True):
            axis.plot([place] * len(losses), losses, "o-", color=color, label=way, ms=5)
    axes[0].set(xlabel="training TFLOPs", ylabel="held-out loss (averaged weights)", yscale="log")
    plain_ticks(axes[0])
    axes[1].set(xlabel="GFLOPs per image and forward pass", ylabel="held-out loss, all noise levels")
    axes[2].set(xlabel="processor ms per image and forward pass, one thread", ylabel="held-out loss, all noise levels")
    axes[1].legend(fontsize=8)
    figure.savefig(path)


def _ms(side: SideTime) -> float:
    """Processor time of an image and a pass."""
    return side.processor_ms / CPU_IMAGES / len(cifar10.NOISE_LEVELS)


def gpu_table(gpu: Mapping[str, Any]) -> str:
    rows = []
    for name, values in gpu["sides"].items():
        side = SideTime(**values)
        middle, low, high = side.clock_eta
        eta = "" if name == COMPILED else f"{middle:.2f} ({low:.2f} to {high:.2f})"
        rows.append([name, f"{side.gflops:.2f}", f"{side.least_ms / len(cifar10.NOISE_LEVELS):.2f}", eta])
    return markdown_table(["", "GFLOPs/image", "least ms/pass", "eta (95 %)"], rows)


def write_page(trained: Mapping[str, Any], cpu: SideTimes, cached: str, rounds: int, out: Path) -> Path:
    """Write report.md, its picture and study.json with the numbers behind them."""
    results, gpu = trained["runs"], trained.get("gpu")
    spent = [run["training_flops"] for run in results.values()]
    command = f"python -m benchmarks.studies.composition_page --data FILE --trained FOLDER --rounds {rounds}"
    machine = f"{cpu_name()}, torch {torch.__version__}, float32, one thread"
    parts = [
        "# Dynamic methods at equal training compute",
        f"Six models learned from the same 11,000 images of CIFAR-10 (`benchmarks/studies/composition.yaml`: batch "
        f"{trained['batch']}, {trained['precision']}) until each had spent {trained['flops']:.3g} training FLOPs "
        f"({min(spent):.3g} to {max(spent):.3g}), on {trained['machine']}. Seeds: "
        f"{', '.join(map(str, trained['seeds']))}; `±` is half the range over them. A budget this small shows what "
        "happens early in training and nothing about convergence. A DyDiT and a DC-DiT of dynamic width spend the "
        "FLOPs of the complete model in training, which masks, and twice those at first; what they save is saved in "
        "drawing.",
        f"Losses are of {cifar10.HELD_OUT} images that none has seen at {len(cifar10.NOISE_LEVELS)} noise levels, the "
        "same noise for all, averaged weights, float32, and as the model draws: what a gate closes is left out. FLOPs "
        "are those of a forward pass, the mean over these levels; times are of the same passes. eta = (time of the "
        "static DiT / time) / (FLOPs of the static DiT / FLOPs), the median of the rounds: 1 means that every saved "
        "FLOP became time.",
        summary(results, cpu, gpu),
        "![loss over training FLOPs, over the FLOPs of drawing and over its time](losses.png)",
        "## Held-out loss by noise level",
        loss_table(results),
        "## Time on a CPU",
        f"{CPU_IMAGES} images, a pass at each noise level in turn, models of the first seed; {machine}. Milliseconds "
        "are of all passes. Processor time does not count the turns of other work; its spread is half the "
        "interquartile range over the median.",
        side_table(cpu),
        *_gpu_parts(trained["machine"], gpu),
        "## TeaCache over the DC-DiT",
        f"{CACHED_IMAGES} images, {CACHED_STEPS} steps with guidance {SCALE:g}, as in `python -m "
        "benchmarks.studies.caching`. FLOPs and times (of the processor) are shares of those without the cache, and "
        "eta compares with them. The error is that of the images against those without the cache, over their root "
        "mean square; beside it stands that of fewer steps which take the same time.",
        cached,
        f"Command: `python3 -m benchmarks.studies.composition --data FILE --out FOLDER --flops {trained['flops']:g}`, "
        f"then `{command}`.",
    ]
    conditions = {key: value for key, value in trained.items() if key != "runs"}
    conditions["cpu"] = {"machine": machine, "sides": {name: side._asdict() for name, side in cpu.sides.items()}}
    out.mkdir(parents=True, exist_ok=True)
    plot(results, cpu, out / "losses.png")
    return write_study(results, conditions, parts, out)


def _gpu_parts(machine: str, gpu: Mapping[str, Any] | None) -> list[str]:
    if gpu is None:
        return []
    return [
        "## Time on a GPU",
        f"{gpu['images']:,} images at a time, bfloat16, {machine}; no graphs. eta compares with the static DiT in its "
        f"fastest form without one: compiled, with the fastest attention of PyTorch. {gpu['conditions']}",
        gpu_table(gpu),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the file that the models learned from")
    parser.add_argument("--trained", type=Path, required=True, help="folder of benchmarks.studies.composition")
    parser.add_argument("--rounds", type=int, default=15, help="timed passes of each model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/composition"), help="folder of the page")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    trained = json.loads((args.trained / "trained.json").read_text())
    cpu = time_on_cpu(args.data, args.trained, args.rounds)
    cached = cache(args.trained / f"{DYNAMIC}.safetensors", max(1, args.rounds // 5))
    print(f"wrote {write_page(trained, cpu, cached, args.rounds, args.out)}")


if __name__ == "__main__":
    main()
