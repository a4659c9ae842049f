"""Pictures of results. Matplotlib is an extra (`pip install 'dcdit[demo]'`) and is imported when a picture is drawn."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dcdit.utils.files import atomically

if TYPE_CHECKING:
    from dcdit.profiling.profile import Profile, Variant


def new_figure(*args: Any, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes (as ``plt.subplots``) on the file-only backend, so that no display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = options.pop("figsize")
    figure = Figure(figsize=size, layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(*args, **options)


def plot_profile(result: "Profile", path: Path) -> None:
    """How many times faster each budget is than each static model, time and FLOPs by stage, and eta over the budgets.

    Bars show the intervals of the times and of eta. Everything of an unreliable profile is hollow.
    """
    figure, (left, middle, right) = new_figure(1, 3, figsize=(15, 4.2), width_ratios=(5, 6, 4))
    statics = [variant for variant in result.variants if variant.drop_fraction is None]
    dynamic = [variant for variant in result.variants if variant.drop_fraction is not None]
    drops = [variant.drop_fraction for variant in dynamic]
    faster: dict[str, Any] = {}
    cheaper: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for number, static in enumerate(statics):
        fewer = np.array([static.gflops / variant.gflops for variant in dynamic])
        etas = np.array([variant.eta[static.name] for variant in dynamic])
        ends = np.array([variant.eta_interval[static.name] for variant in dynamic]).T
        below_above = np.abs(ends - etas)
        label = f"than {static.name}"
        faster[label], cheaper[label], intervals[label] = etas * fewer, fewer, below_above * fewer
        hollow = {"capsize": 2, "mfc": None if result.reliable else "white"}
        right.errorbar(drops, etas, below_above, fmt="o-", color=f"C{number}", label=f"vs {static.name}", **hollow)
    names = [f"drop {drop:g}" for drop in drops]
    plot_times_faster(left, names, faster, cheaper, intervals, filled=result.reliable)
    left.set(xlabel=f"times faster (batch {result.batch})")
    _plot_stages(middle, dynamic)
    right.axhline(1, color="black", ls=":", lw=1)
    right.set(xlabel="drop fraction", ylabel="conversion eta")
    right.set_ylim(0, 1.1 * max(1.0, right.get_ylim()[1]))
    right.legend(fontsize=7)
    title, color = f"{result.model} on {result.device}, {result.dtype}", "black"
    if not result.reliable:
        title, color = f"UNRELIABLE TIMINGS: {result.warnings[0]}\n{title}", "red"
    figure.suptitle(title, color=color, fontsize=10)
    atomically(path, figure.savefig)


def plot_times_faster(
    axis: Any,
    names: Sequence[str],
    faster: Mapping[str, Sequence[float]],
    cheaper: Mapping[str, Sequence[float]] | None = None,
    intervals: Mapping[str, Any] | None = None,
    *,
    filled: bool = True,
) -> None:
    """Horizontal bars from 1, a group for each name and a bar for each comparison, with their numbers beside them.

    Args:
        axis: to draw on.
        names: of the groups, from top to bottom.
        faster: comparison -> times of the others over ours, one for each name; NaN draws nothing.
        cheaper: the same of FLOPs, drawn as diamonds: where a bar would end if all saved FLOPs became time.
        intervals: comparison -> (2, names), how far the times may be below and above.
        filled: whether the bars are; hollow ones are not to be trusted.
    """
    thick = 0.8 / len(faster)
    longest = 1.0
    for number, (label, values) in enumerate(faster.items()):
        color, places = f"C{number}", np.arange(len(names)) - 0.4 + thick * (number + 0.5)
        style = {"color": color} if filled else {"facecolor": "white", "edgecolor": color}
        axis.barh(places, np.nan_to_num(np.asarray(values) - 1), 0.9 * thick, left=1, label=label, **style)
        ends = np.asarray(values, dtype=float)
        if intervals is not None:
            axis.errorbar(values, places, xerr=intervals[label], fmt="none", ecolor="black", capsize=2, lw=1)
            ends = ends + intervals[label][1]
        if cheaper is not None:
            shown = "times fewer FLOPs" if number == len(faster) - 1 else None
            axis.plot(cheaper[label], places, "D", color="white", mec="black", ms=5, label=shown)
            ends = np.fmax(ends, cheaper[label])
        ends = np.fmax(ends, 1)  # the number of a slower one stands right of the line
        for value, end, place, flops in zip(values, ends, places, (cheaper or {}).get(label, values), strict=True):
            text = f"{value:.3g}" if cheaper is None else f"{value:.3g} (FLOPs {flops:.3g})"
            if value == value:
                axis.annotate(text, (end, place), (6, 0), textcoords="offset points", fontsize=7, va="center")
        longest = float(np.nanmax([longest, *ends]))
    axis.axvline(1, color="black", ls=":", lw=1)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, (1.15 if cheaper is None else 1.4) * longest)
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)


def _plot_stages(axis: Any, dynamic: Sequence["Variant"]) -> None:
    """How time and FLOPs divide among the stages, a pair of bars for each budget, so that slow stages show."""
    names, columns = [], []
    for variant in dynamic:
        for unit, stages in (("time", variant.stage_ms), ("FLOPs", variant.stage_gflops)):
            names.append(f"{unit}\n{variant.drop_fraction:g}")
            total = sum(value for stage, value in stages.items() if stage != "whole")
            columns.append({stage: value / total for stage, value in stages.items()})
    bottom = np.zeros(len(names))
    for stage in (stage for stage in dynamic[0].stage_ms if stage != "whole"):
        height = np.array([column.get(stage, 0.0) for column in columns])
        axis.bar(names, height, bottom=bottom, label=stage)
        bottom += height
    axis.set(xlabel="drop fraction", ylabel="fraction of a forward, by stage", ylim=(0, 1))
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def plot_quality(models: Mapping[str, Sequence[Mapping[str, Any]]], quality: str, path: Path) -> None:
    """Quality against FLOPs and, where it was timed, against time, with error bars: a line for each model.

    Args:
        models: name -> points, one for each budget: ``quality`` and ``gflops``, and optionally ``ms``, the spreads
            ``quality_error`` and ``ms_error``, and ``label``, such as the drop fraction. FLOPs and time are per image,
            of a forward pass or of a whole run.
        quality: what it is, for the axis; say whether less is better.
        path: of the picture.
    """
    timed = all("ms" in point for points in models.values() for point in points)
    costs = {"gflops": "GFLOPs per image", **({"ms": "ms per image"} if timed else {})}
    figure, axes = new_figure(1, len(costs), figsize=(5.5 * len(costs), 4), squeeze=False, sharey=True)
    for axis, (cost, name) in zip(axes[0], costs.items(), strict=True):
        for number, (model, points) in enumerate(models.items()):
            x, y = ([point[key] for point in points] for key in (cost, "quality"))
            errors = {
                side: [point.get(f"{key}_error", 0.0) for point in points]
                for side, key in (("xerr", cost), ("yerr", "quality"))
            }
            axis.errorbar(x, y, **errors, fmt="o-", ms=4, lw=1, capsize=3, color=f"C{number}", label=model)
            for point in points:
                place = (point[cost], point["quality"])
                text = point.get("label", "")
                axis.annotate(text, place, (5, 4), textcoords="offset points", fontsize=7)
        axis.set(xlabel=name, xlim=(0, 1.15 * max(axis.get_xlim()[1], 0)))
        axis.margins(y=0.15)
    axes[0, 0].set(ylabel=quality)
    axes[0, 0].legend(fontsize=8)
    atomically(path, figure.savefig)


def plot_training(log: Sequence[dict[str, Any]], target: float, path: Path) -> None:
    """The loss and the compression over the steps.

    Args:
        log: rows with ``step``, ``loss`` and ``natural``, the kept fraction before dropping.
        target: the compression N that the ratio loss aims at.
        path: of the picture.
    """
    figure, (left, right) = new_figure(1, 2, figsize=(9, 3.2))
    steps = [row["step"] for row in log]
    left.plot(steps, [row["loss"] for row in log], lw=1)
    left.set(xlabel="step", ylabel="diffusion loss", yscale="log")
    compression = [1 / row["natural"] if row["natural"] else math.nan for row in log]  # untrained: no p above one half
    right.plot(steps, compression, lw=1, label="positions per kept token")
    right.axhline(target, color="black", ls=":", lw=1, label=f"target N = {target:g}")
    # An untrained router keeps hardly anything: on a linear axis its first steps would hide all others.
    right.set(xlabel="step", ylabel="compression N (before dropping)", yscale="log", ylim=(1, None))
    for axis in (left, right):
        plain_ticks(axis)
    right.legend(fontsize=7)
    atomically(path, figure.savefig)


def plain_ticks(axis: Any) -> None:
    """Write the ticks of a logarithmic y axis as 0.3 and 20, not as powers of ten, and none that would crowd others."""

    def text(value: float, position: int) -> str:
        lowest, highest = axis.get_ylim()
        digits = "1234568" if highest < 10 * lowest else "1235"
        return f"{value:g}" if f"{value:e}"[0] in digits else ""

    axis.yaxis.set_major_formatter(text)
    axis.yaxis.set_minor_formatter(text)


def plot_boundary_maps(columns: Sequence[dict[str, Any]], path: Path, image: str = "input") -> None:
    """One column per noise level: an image, the router's probability, the kept tokens.

    Args:
        columns: each holds ``title``, ``image`` (H, W, 3) in [0, 1], ``prob`` (H, W) and ``mask`` (H, W) bool.
        path: of the picture.
        image: label of the row of images.
    """
    figure, axes = new_figure(3, len(columns), figsize=(2.1 * len(columns), 6.6), squeeze=False)
    for axis, column in zip(axes.T, columns, strict=True):
        axis[0].imshow(column["image"], interpolation="nearest")
        axis[0].set_title(column["title"], fontsize=8)
        shown = axis[1].imshow(column["prob"], vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        axis[2].imshow(column["image"] * 0.25, interpolation="nearest")
        axis[2].imshow(np.where(column["mask"], 1.0, np.nan), vmin=0, vmax=1.3, cmap="inferno", interpolation="nearest")
        axis[2].set_title(f"{column['mask'].mean():.0%} kept", fontsize=8)
    for axis, label in zip(axes[:, 0], (image, "probability", "kept tokens"), strict=True):
        axis.set_ylabel(label, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(shown, ax=axes[1, -1], fraction=0.046)
    atomically(path, figure.savefig)


def plot_sampling(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """The fraction of the tokens kept in each branch of guidance, and the FLOPs, from noise to data.

    Args:
        runs: each holds ``name`` and ``calls``, the records of :class:`dcdit.sample.model_calls.ModelCalls`.
        path: of the picture.
    """
    branches = {"conditional branch": ""}
    if any("kept_null" in call for run in runs for call in run["calls"]):
        branches["unconditional branch"] = "_null"
    figure, axes = new_figure(1, len(branches) + 1, figsize=(4.4 * (len(branches) + 1), 3.6), squeeze=False)
    *kept, flops = axes[0]
    for number, run in enumerate(runs):
        color = f"C{number}"
        for axis, suffix in zip(kept, branches.values(), strict=True):
            calls = [call for call in run["calls"] if f"kept{suffix}" in call]
            times = [call["t"] / 1000 for call in calls]
            axis.plot(times, [call[f"natural{suffix}"] for call in calls], "--", color=color, lw=1, zorder=1)
            axis.plot(times, [call[f"kept{suffix}"] for call in calls], color=color, lw=1.5, label=run["name"])
        times = [call["t"] / 1000 for call in run["calls"]]
        flops.plot(times, [call["gflops"] for call in run["calls"]], color=color, lw=1.5, label=run["name"])
    for axis, title in zip(kept, branches, strict=True):
        axis.set(title=title, ylabel="fraction of the tokens", ylim=(0, None))
    flops.set(title="cost, all branches", ylabel="GFLOPs per image and call", ylim=(0, None))
    for axis in axes[0]:
        axis.set_xlabel("time (1 noise, 0 data)")
        axis.invert_xaxis()
    kept[0].plot([], [], "--", color="black", lw=1, label="before dropping")
    kept[0].legend(fontsize=7)
    atomically(path, figure.savefig)
