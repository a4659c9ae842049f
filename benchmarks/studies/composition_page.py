"""What do methods save that compose with each other? Second part: time the trained models on a CPU, and write the page.

``python -m benchmarks.studies.composition_page --data FILE --trained FOLDER`` reads what
:mod:`benchmarks.studies.composition` left in FOLDER, measures on one thread what
:mod:`benchmarks.studies.composition_cpu` says, unless FOLDER holds that already, and writes the page: held-out losses
at equal training FLOPs beside the FLOPs and the times of drawing.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch

from benchmarks.studies import cifar10
from benchmarks.studies.caching import Row
from benchmarks.studies.comparison import Results, by_way, loss_table, spread_text, write_study
from benchmarks.studies.composition import COMPILED, STATIC
from benchmarks.studies.composition_cpu import (
    CACHED_IMAGES,
    CACHED_STEPS,
    CPU_IMAGES,
    SCALE,
    SLICED_STEPS,
    measure_on_cpu,
)
from benchmarks.studies.conversion import SideTime, SideTimes, side_table
from benchmarks.studies.training import losses_by_flops
from dcdit.profiling.plots import new_figure, plain_ticks
from dcdit.utils.tables import markdown_table

MARKS = (0.42, 0.72, 0.98)
"""Shares of the training FLOPs at which the losses are compared."""

Curve = Sequence[Sequence[float]]
"""Training FLOPs and held-out loss of the current weights, at each validation."""


def curve_of(run: Mapping[str, Any]) -> Curve:
    return losses_by_flops(run["course"], "val_loss")


def loss_at(curve: Curve, flops: float) -> float | None:
    """Interpolated. None if the run did not spend so many."""
    if not curve or not curve[0][0] <= flops <= curve[-1][0]:
        return None
    return float(np.interp(flops, *zip(*curve, strict=True)))


def equal_compute_table(results: Results, goal: float) -> str:
    """Loss of each model after the same training FLOPs, and how far it is from the static DiT."""
    curves = {way: [curve_of(run) for run in runs] for way, runs in by_way(results).items()}
    rows = []
    for way, of_way in curves.items():
        cells = [way, f"{fmean(run['training_flops'] for run in by_way(results)[way]):.2e}"]
        for share in MARKS:
            losses = [loss_at(curve, share * goal) for curve in of_way]
            static = [loss_at(curve, share * goal) for curve in curves[STATIC]]
            known, base = ([loss for loss in some if loss is not None] for some in (losses, static))
            cells += ["", ""] if len(known) < len(losses) else [spread_text(known), _against(known, base, way)]
        rows.append(cells)
    marks = [cell for share in MARKS for cell in (f"loss at {share * goal:.2e}", "against static")]
    return markdown_table(["", "spent training FLOPs", *marks], rows)


def _against(losses: Sequence[float], static: Sequence[float], way: str) -> str:
    return "" if way == STATIC or not static else f"{round(fmean(losses) / fmean(static) - 1, 3) + 0.0:+.1%}"


def summary(results: Results, cpu: SideTimes, gpu: Mapping[str, Any] | None) -> str:
    """A row for each model: what a forward pass costs and takes."""
    rows = []
    for way, runs in by_way(results).items():
        side, on_gpu = cpu.sides[way], SideTime(**gpu["sides"][way]) if gpu else None
        cells = f"{fmean(run['gflops']['drawn'] for run in runs):.2f}", f"{_ms(side):.1f}", f"{side.eta:.2f}"
        rows.append([way, *cells, f"{on_gpu.clock_eta[0]:.2f}" if on_gpu else ""])
    return markdown_table(["", "GFLOPs/image", "CPU ms/image", "eta, CPU", "eta, GPU"], rows)


def cache_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        time = median(row.times)
        taken = f"{time:.2f} ({min(row.times):.2f} to {max(row.times):.2f})"
        fewer = f"{row.steps_error:.3f} ({row.steps} steps)"
        shares = f"{row.left_out:.0%}", f"{row.flops:.2f}", taken, f"{row.flops / time:.2f}"
        lines.append([row.setting, *shares, f"{row.error:.3f}", fewer])
    return markdown_table(["", "left out", "FLOPs", "time", "eta", "error", "error of fewer steps"], lines)


def plot(results: Results, goal: float, cpu: SideTimes, path: Path) -> None:
    """Held-out loss over training FLOPs; and at equal training FLOPs, over the FLOPs of drawing and over its time."""
    figure, axes = new_figure(1, 3, figsize=(15, 4.4))
    marks, fills = MARKS[:2], ("full", "none")
    for number, (way, runs) in enumerate(by_way(results).items()):
        color, curves = f"C{number}", [curve_of(run) for run in runs]
        for curve in filter(None, curves):
            axes[0].plot(*zip(*((flops / 1e12, loss) for flops, loss in curve), strict=True), color=color, lw=1)
        places = fmean(run["gflops"]["drawn"] for run in runs), _ms(cpu.sides[way])
        for axis, place in zip(axes[1:], places, strict=True):
            axis.plot([], [], "o", color=color, label=way, ms=5)
            for share, fill in zip(marks, fills, strict=True):
                losses = [loss for curve in curves if (loss := loss_at(curve, share * goal)) is not None]
                if len(losses) == len(curves):
                    axis.plot([place] * len(losses), losses, "o-", color=color, ms=5, fillstyle=fill)
    for share in marks:
        axes[0].axvline(share * goal / 1e12, color="black", ls=":", lw=1)
    axes[0].set(xlabel="training TFLOPs", ylabel="held-out loss (256 images)", yscale="log")
    plain_ticks(axes[0])
    label = " and ".join(f"{share * goal:.2e} ({kind})" for share, kind in zip(marks, ("full", "hollow"), strict=True))
    axes[1].set(xlabel="GFLOPs per image and forward pass", ylabel=f"held-out loss at {label}")
    axes[2].set(xlabel="processor ms per image and forward pass, one thread", ylabel=f"held-out loss at {label}")
    axes[1].legend(fontsize=8)
    figure.savefig(path)


def _ms(side: SideTime) -> float:
    """Processor time of an image and a pass."""
    return side.processor_ms / CPU_IMAGES / len(cifar10.NOISE_LEVELS)


def gpu_table(gpu: Mapping[str, Any]) -> str:
    sides = {name: SideTime(**values) for name, values in gpu["sides"].items()}
    static, rows = sides[STATIC], []
    for name, side in sides.items():
        middle, low, high = side.clock_eta
        compiled = "" if name == COMPILED else f"{middle:.2f} ({low:.2f} to {high:.2f})"
        eager = static.least_ms / side.least_ms * side.gflops / static.gflops
        cells = f"{side.gflops:.2f}", f"{side.least_ms / len(cifar10.NOISE_LEVELS):.2f}", compiled
        rows.append([name, *cells, "" if name in (COMPILED, STATIC) else f"{eager:.2f}"])
    head = ["", "GFLOPs/image", "least ms/pass", f"eta against {COMPILED} (95 %)", f"eta against {STATIC}, least times"]
    return markdown_table(head, rows)


def check_sentence(results: Results, losses: Mapping[str, Sequence[float]]) -> str:
    """How far the losses measured here are from those of the machine that trained."""
    apart = max(
        abs(here / there - 1)
        for name, levels in losses.items()
        for here, there in zip(levels, results[f"{name}-0"]["loss_by_level"]["drawn"], strict=True)
    )
    return (
        f"The losses of the first seed, measured again on the CPU from the same weights, differ by at most {apart:.1e} "
        "of the loss at any noise level."
    )


def slices_sentences(slices: Mapping[str, Mapping[str, Any]]) -> str:
    return "\n".join(
        f"- {name}: {', '.join(f'{share:.0%} of the {part}' for part, share in found['open'].items())} are computed. "
        f"Sliced and masked outputs differ by at most {found['difference']:.1e} of the largest number. The slices for "
        f"{SLICED_STEPS} steps take {found['bytes'] / 2**20:.1f} MiB beside {found['weights'] / 2**20:.1f} of weights."
        for name, found in slices.items()
    )


def write_page(trained: Mapping[str, Any], measured: Mapping[str, Any], out: Path) -> Path:
    """Write report.md, its picture and study.json with the numbers behind them."""
    results, gpu, goal = trained["runs"], trained.get("gpu"), trained["flops"]
    sides = {name: SideTime(**side) for name, side in measured["sides"].items()}
    cpu = SideTimes(sides, measured["conditions"])
    first = f"--flops {goal:g}" + (f" --minutes {trained['minutes']:g}" if trained["minutes"] else "")
    spent = [run["training_flops"] for run in results.values()]
    parts = [
        "# Dynamic methods at equal training compute",
        f"Six models learned from the same 11,000 images of CIFAR-10 (`benchmarks/studies/composition.yaml`: batch "
        f"{trained['batch']}, {trained['precision']}) on {trained['machine']}, each until it had spent {goal:.3g} "
        f"training FLOPs or its minutes were over; they spent {min(spent):.2e} to {max(spent):.2e}. Seeds: "
        f"{', '.join(map(str, trained['seeds']))}; `±` is half the range over them. A budget this small shows what "
        "happens early in training and nothing about convergence. A DyDiT and a DC-DiT of dynamic width spend the "
        "FLOPs of the complete model in training, which masks, and twice those at first; what they save is saved in "
        "drawing.",
        "## Loss at equal training FLOPs",
        "On 256 held-out images, each at its own random time, the same for all; of the weights of that moment, "
        "interpolated between validations (averaged weights would still remember the first ones, the more so the fewer "
        "steps a model took for its FLOPs). A validation may be a percent or two off, as the curves show. Empty: a run "
        "had stopped before. Dotted in the picture: the first two of these numbers of FLOPs.",
        equal_compute_table(results, goal),
        "![loss over training FLOPs; at equal training FLOPs over the FLOPs of drawing and its time](losses.png)",
        "## What a forward pass costs",
        f"As the model draws: what a gate closes is left out. FLOPs are the mean over {len(cifar10.NOISE_LEVELS)} "
        "noise levels at the end of the runs; times are of the same passes, of the models of the first seed. eta = "
        "(time of the static DiT / time) / (FLOPs of the static DiT / FLOPs), the median of the rounds: 1 means that "
        "every saved FLOP became time. On the CPU it is of processor time, on the GPU of the clock and against the "
        "compiled static DiT.",
        summary(results, cpu, gpu),
        "## Time on a CPU",
        f"{CPU_IMAGES} images, a pass at each noise level in turn; {measured['machine']}. Milliseconds are of all "
        "passes. Processor time does not count the turns of other work; its spread is half the interquartile range "
        "over the median.",
        side_table(cpu),
        slices_sentences(measured["slices"]),
        *_gpu_parts(trained["machine"], gpu),
        "## TeaCache over the DC-DiT",
        f"{CACHED_IMAGES} images, {CACHED_STEPS} steps with guidance {SCALE:g}, as in `python -m "
        "benchmarks.studies.caching`, on the same CPU. FLOPs and times (of the processor) are shares of those without "
        "the cache, and eta compares with them. The error is that of the images against those without the cache, over "
        "their root mean square; beside it stands that of fewer steps which take the same time.",
        cache_table([Row(**row) for row in measured["teacache"]]),
        "## Loss by noise level, at the end of each run",
        f"Not at equal FLOPs. {cifar10.HELD_OUT} held-out images, the same noise for all, averaged weights, float32, "
        f"as the model draws. {check_sentence(results, measured['losses'])}",
        loss_table(results),
        f"Commands: `python3 -m benchmarks.studies.composition --data FILE --out FOLDER {first}`, then "
        f"`python -m benchmarks.studies.composition_page --data FILE --trained FOLDER --rounds {measured['rounds']}`.",
    ]
    kept = {name: {**run, "course": curve_of(run)} for name, run in results.items()}
    out.mkdir(parents=True, exist_ok=True)
    plot(results, goal, cpu, out / "losses.png")
    conditions = {key: value for key, value in trained.items() if key != "runs"} | {"cpu": measured}
    return write_study(kept, conditions, parts, out)


def _gpu_parts(machine: str, gpu: Mapping[str, Any] | None) -> list[str]:
    if gpu is None:
        return []
    return [
        "## Time on a GPU",
        f"{gpu['images']:,} images at a time, bfloat16, {machine}; no graphs. The first eta compares with the static "
        "DiT in its fastest form without one: compiled, with the fastest attention of PyTorch. The second compares "
        "with the static DiT as all others ran, in plain calls: the ratio of the least times, without an interval. "
        f"{gpu['conditions']}",
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
    measured = measure_on_cpu(args.data, args.trained, args.rounds)
    print(f"wrote {write_page(trained, measured, args.out)}")


if __name__ == "__main__":
    main()
