"""The page of the CIFAR-10 study: the results of every run, as tables and pictures."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.training import losses_by_flops
from dcdit.profiling.plots import new_figure, plain_ticks, plot_quality
from dcdit.utils.images import grid
from dcdit.utils.tables import markdown_table

Results = Mapping[str, dict[str, Any]]
METRICS = ("FID", "KID", "precision", "recall")
SHOWN = 16
"""Samples of a run in the picture."""


def write_page(results: Results, conditions: Mapping[str, Any], out: Path) -> Path:
    """Write report.md, its pictures, and study.json with the numbers behind them.

    Args:
        results: run name ("<model>-<seed>") -> what was measured of it.
        conditions: of the study: ``title``, ``spent`` (by every run), ``caution``, ``samples``, ``reference``,
            ``steps``, ``levels``, ``held_out``, ``machine`` and ``command``.
    """
    out.mkdir(parents=True, exist_ok=True)
    _plot_losses(results, conditions["levels"], out / "losses.png")
    _plot_routing(results, out / "routing.png")
    plot_quality(quality_points(results), "held-out loss (less is better)", out / "quality.png")
    sheets = np.array([result["sheet"][:SHOWN] for result in results.values()], dtype=np.uint8)
    grid(sheets.reshape(-1, *sheets.shape[2:]), sheets.shape[1], row_names=list(results)).save(out / "samples.png")
    runs = {name: {key: value for key, value in result.items() if key != "sheet"} for name, result in results.items()}
    (out / "study.json").write_text(json.dumps({"conditions": dict(conditions), "runs": runs}, indent=1) + "\n")
    page = out / "report.md"
    page.write_text(_page(results, conditions))
    return page


def _page(results: Results, conditions: Mapping[str, Any]) -> str:
    models = list(dict.fromkeys(map(_model, results)))
    first = next(iter(results.values()))
    parts = [
        f"# {conditions['title']}",
        f"Every run spent {conditions['spent']}. Losses are of {conditions['held_out']} images that none has seen at "
        f"{len(conditions['levels'])} noise levels, the same noise for all, averaged weights. {conditions['caution']}",
        f"Machine: {conditions['machine']}. Command: `{conditions['command']}`.",
        "## Runs",
        _table(results, ["parameters", "steps", "images seen", "GFLOPs/forward", "held-out loss"], _run_cells),
        "Mean over the seeds, with half the range between them:",
        _summary(results, models),
        "![held-out loss over training FLOPs, and by noise level](losses.png)",
    ]
    if any("evaluation" in result for result in results.values()):
        evaluated = [result["evaluation"] for result in results.values() if "evaluation" in result]
        floor = evaluated[0]["floor"]
        parts += [
            "## Samples",
            f"{conditions['samples']} images of each run ({conditions['steps']} Euler steps, no guidance, classes in "
            f"turn) against {conditions['reference']:,} real images. FID at this n is mostly bias: compare it with the "
            "last row, which is of equally many real images.",
            _table(
                {**results, "real images": {"evaluation": {"figures": floor}}},
                ["n", *METRICS],
                lambda result: _metric_cells(result, conditions["samples"]),
            ),
        ]
    parts += ["One row for each run, from the same noise:", "![samples](samples.png)"]
    routed = {name: result for name, result in results.items() if "routing" in result}
    parts += [
        "## Where the tokens go",
        "Kept fraction without dropping, by noise level (0 is data, 1 is noise), and the correlation of the router's "
        "probability with local detail. Measured, not enforced.",
        markdown_table(
            ["run", *(f"{level:g}" for level in conditions["levels"])],
            [
                row
                for name, result in routed.items()
                for row in (
                    [name, *(f"{share:.1%}" for share in result["routing"]["kept_share"])],
                    [f"{name}, correlation", *(f"{r:+.2f}" for r in result["routing"]["detail_correlation"])],
                )
            ],
        ),
        "![kept fraction by noise level](routing.png)",
        "## Budgets",
        "The same DC-DiT weights with tokens dropped:",
        markdown_table(
            ["run", *(f"drop {rho}" for rho in first["loss"])],
            [
                [name, *(f"{result['loss'][rho]:.4f} at {result['gflops'][rho]:.2f} GFLOPs" for rho in result["loss"])]
                for name, result in routed.items()
            ],
        ),
        "Loss against what a forward pass costs; error bars are half the range over the seeds and the spread of the "
        "times (half the interquartile range):",
        "![held-out loss against FLOPs and seconds](quality.png)",
    ]
    return "\n\n".join(parts) + "\n"


def quality_points(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The points of :func:`plot_quality`: of each model, the means over its seeds at each drop fraction."""
    models: dict[str, list[dict[str, Any]]] = {}
    for model in dict.fromkeys(map(_model, results)):
        runs = [result for name, result in results.items() if _model(name) == model]
        models[model] = []
        for rho in runs[0]["loss"]:
            losses = [run["loss"][rho] for run in runs]
            point = {
                "quality": np.mean(losses),
                "quality_error": (max(losses) - min(losses)) / 2,
                "gflops": np.mean([run["gflops"][rho] for run in runs]),
                "label": "" if rho == "None" else f"drop {rho}",
            }
            if all("seconds" in run for run in runs):  # results of earlier versions have none
                times, spreads = zip(*(run["seconds"][rho] for run in runs), strict=True)
                point |= {"ms": 1e3 * np.mean(times), "ms_error": 1e3 * max(spreads)}
            models[model].append(point)
    return models


def _model(run: str) -> str:
    return run.rpartition("-")[0]


def _table(results: Results, head: Sequence[str], cells: Callable[[dict[str, Any]], list[str]]) -> str:
    return markdown_table(["run", *head], [[name, *cells(result)] for name, result in results.items()])


def _run_cells(result: dict[str, Any]) -> list[str]:
    plain = next(iter(result["loss"]))
    return [
        f"{result['parameters']:,}",
        f"{result['steps']:,}",
        f"{result['images']:,}",
        f"{result['gflops'][plain]:.3f}",
        f"{result['loss'][plain]:.4f}",
    ]


def _metric_cells(result: dict[str, Any], samples: int) -> list[str]:
    figures = result.get("evaluation", {}).get("figures", {})
    shown = [f"{figures[metric]['value']:.4g}" if metric in figures else "" for metric in METRICS]
    return [str(samples), *shown]


def _summary(results: Results, models: Sequence[str]) -> str:
    metrics = ["held-out loss", *METRICS[:2]]
    rows = []
    for model in models:
        runs = [result for name, result in results.items() if _model(name) == model]
        values = {"held-out loss": [next(iter(run["loss"].values())) for run in runs]}
        for metric in METRICS[:2]:
            values[metric] = [run["evaluation"]["figures"][metric]["value"] for run in runs if "evaluation" in run]
        rows.append([model, *(_spread(values[metric]) for metric in metrics)])
    return markdown_table(["model", *metrics], rows)


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4g} ± {(max(values) - min(values)) / 2:.2g}" if values else ""


def _plot_losses(results: Results, levels: Sequence[float], path: Path) -> None:
    figure, (left, right) = new_figure(1, 2, figsize=(11, 4))
    models = list(dict.fromkeys(map(_model, results)))
    for name, result in results.items():
        number, label = models.index(_model(name)), _model(name) if name.endswith("-0") else None
        left.plot(*zip(*losses_by_flops(result["log"]), strict=True), color=f"C{number}", lw=1, label=label)
        losses = next(iter(result["loss_by_level"].values()))
        right.plot(levels, losses, "o-", ms=3, lw=1, color=f"C{number}", label=label)
    left.set(xlabel="training FLOPs", ylabel="held-out loss (while training, 128 images)", yscale="log")
    right.set(xlabel="noise level", ylabel="held-out loss", yscale="log")
    for axis in (left, right):
        plain_ticks(axis)
    left.legend(fontsize=8)
    figure.savefig(path)


def _plot_routing(results: Results, path: Path) -> None:
    figure, (left, right) = new_figure(1, 2, figsize=(9, 3.2))
    for name, result in results.items():
        if "routing" not in result:
            continue
        study = result["routing"]
        (line,) = left.plot(study["levels"], study["kept_share"], "o-", ms=3, label=name)
        left.plot(study["levels"], study["kept_share_detailed"], ":", color=line.get_color(), lw=1)
        left.plot(study["levels"], study["kept_share_smooth"], "--", color=line.get_color(), lw=1)
        right.plot(study["levels"], study["detail_correlation"], "o-", ms=3, color=line.get_color())
    left.set(xlabel="noise level", ylabel="kept fraction", title="dotted: detailed third, dashed: smooth third")
    left.title.set_fontsize(8)
    left.legend(fontsize=8)
    right.axhline(0, color="black", lw=0.5)
    right.set(xlabel="noise level", ylabel="correlation with local detail")
    figure.savefig(path)
