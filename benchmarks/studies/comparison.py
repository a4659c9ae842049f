"""Tables and the picture of a study that trains one model in several ways: the same losses and routing for each way."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies import cifar10
from dcdit.checkpoint import read_trainer
from dcdit.config import TrainConfig
from dcdit.profiling.plots import new_figure, plain_ticks
from dcdit.utils.tables import markdown_table

Results = Mapping[str, dict[str, Any]]
"""Run name ("<way>-<seed>") -> the losses, the routing and the course of that run."""


def measure_runs(
    planned: Mapping[str, TrainConfig], measure: Callable[[str, TrainConfig], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What is measured of each run, by its name. It is kept beside the run, and only a longer run is measured again."""
    results = {}
    for name, config in planned.items():
        file = Path(config.run.out) / f"measured-{read_trainer(config.run.out)['step']}.json"
        if not file.is_file():
            print(f"measuring {name}", flush=True)
            file.write_text(json.dumps(measure(name, config)))
        results[name] = json.loads(file.read_text())
    return results


def write_study(results: Results, conditions: Mapping[str, Any], parts: Sequence[str], out: Path) -> Path:
    """Write report.md from its parts, and study.json with the numbers behind them."""
    out.mkdir(parents=True, exist_ok=True)
    runs = {name: {key: value for key, value in result.items() if key != "log"} for name, result in results.items()}
    (out / "study.json").write_text(json.dumps({"conditions": dict(conditions), "runs": runs}, indent=1) + "\n")
    page = out / "report.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page


def way_of(run: str) -> str:
    """``"official-1"`` -> ``"official"``."""
    return run.rpartition("-")[0]


def by_way(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The runs of each way, one for each seed."""
    return {way: [run for name, run in results.items() if way_of(name) == way] for way in map(way_of, results)}


def loss_table(results: Results) -> str:
    """Held-out loss without dropping, over all noise levels and at each, with the steps and the cost of a forward."""
    rows = [
        [
            way,
            f"{sum(run['steps'] for run in runs) / len(runs):.0f}",
            f"{sum(first(run['gflops']) for run in runs) / len(runs):.2f}",
            spread_text([first(run["loss"]) for run in runs]),
            *_means([first(run["loss_by_level"]) for run in runs], "{:.3f}"),
        ]
        for way, runs in by_way(results).items()
    ]
    return markdown_table(["", "steps", "GFLOPs/forward", "all levels", *_levels()], rows)


def routing_table(results: Results) -> str:
    """Kept fraction by noise level, and the correlation of the probability with local detail."""
    rows = []
    for way, runs in by_way(results).items():
        routing = [run["routing"] for run in runs]
        rows.append([way, *_means([study["kept_share"] for study in routing], "{:.1%}")])
        rows.append([f"{way}, correlation", *_means([study["detail_correlation"] for study in routing], "{:+.2f}")])
    return markdown_table(["", *_levels()], rows)


def plot_courses(results: Results, path: Path) -> None:
    """Held-out loss and kept fraction while training. Makes the folder of the picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = new_figure(1, 2, figsize=(11, 4))
    for number, (way, runs) in enumerate(by_way(results).items()):
        for run, label in zip(runs, [way] + [None] * len(runs), strict=False):
            losses = [(record["step"], record["val_loss_ema"]) for record in run["course"] if "val_loss_ema" in record]
            kept = [(record["step"], record["natural"]) for record in run["course"] if "natural" in record]
            left.plot(*zip(*losses, strict=True), color=f"C{number}", lw=1, label=label)
            right.plot(*zip(*kept, strict=True), color=f"C{number}", lw=1)
    left.set(xlabel="step", ylabel="held-out loss (128 images, averaged weights)", yscale="log")
    plain_ticks(left)
    right.set(xlabel="step", ylabel="kept fraction of the training batches")
    left.legend(fontsize=8)
    figure.savefig(path)


def first(values: Mapping[str, Any]) -> Any:
    """Without dropping: the first of the drop fractions."""
    return next(iter(values.values()))


def _levels() -> list[str]:
    return [f"{level:g}" for level in cifar10.NOISE_LEVELS]


def _means(rows: Sequence[Sequence[float]], form: str) -> list[str]:
    return [form.format(sum(column) / len(column)) for column in zip(*rows, strict=True)]


def spread_text(values: Sequence[float]) -> str:
    """The mean over the seeds, and half their range."""
    mean = f"{sum(values) / len(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.4f}"
