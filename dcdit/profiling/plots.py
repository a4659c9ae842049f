"""Pictures of results. Matplotlib is an extra (`pip install 'dcdit[demo]'`) and is imported when a picture is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from dcdit.profiling.profile import Profile, Side


def new_figure(*args: Any, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes (as ``plt.subplots``) on the file-only backend, so that no display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = options.pop("figsize")
    figure = Figure(figsize=size, layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(*args, **options)


def plot_profile(result: "Profile", path: Path) -> None:
    """Time against FLOPs with the eta = 1 line through each static model, both by stage, and eta over the budgets."""
    figure, (left, middle, right) = new_figure(1, 3, figsize=(15, 4.2), width_ratios=(5, 6, 4))
    statics = [side for side in result.sides if side.drop_fraction is None]
    dynamic = [side for side in result.sides if side.drop_fraction is not None]
    edge = 1.1 * max(side.gflops for side in result.sides)
    for number, side in enumerate(statics):
        line = [0, edge * side.ms / side.gflops]
        left.plot([0, edge], line, "--", color=f"C{number}", lw=1, label=f"eta = 1 vs {side.name}")
        left.plot(side.gflops, side.ms, "s", color=f"C{number}")
        etas = [budget.eta[side.name] for budget in dynamic]
        right.plot(
            [budget.drop_fraction for budget in dynamic], etas, "o-", color=f"C{number}", label=f"vs {side.name}"
        )
    left.plot([s.gflops for s in dynamic], [s.ms for s in dynamic], "o-", color="C3", label=result.model)
    for side in dynamic:
        place = (side.gflops, side.ms)
        text = f"drop {side.drop_fraction:g}"
        left.annotate(text, place, textcoords="offset points", xytext=(5, -11), fontsize=7)
    left.set(xlabel="GFLOPs per image", ylabel=f"ms per forward, batch {result.batch}", xlim=(0, edge), ylim=(0, None))
    left.legend(fontsize=7)
    _plot_stages(middle, dynamic)
    right.axhline(1, color="black", ls=":", lw=1)
    right.set(xlabel="drop fraction", ylabel="conversion eta")
    right.set_ylim(0, 1.1 * max(1.0, right.get_ylim()[1]))
    right.legend(fontsize=7)
    figure.suptitle(f"{result.model} on {result.device}, {result.dtype}", fontsize=10)
    figure.savefig(path)


def _plot_stages(axis: Any, dynamic: Sequence["Side"]) -> None:
    """Shares of the time and of the FLOPs, a pair of bars for each budget: a stage that is slow per FLOP shows."""
    names, columns = [], []
    for side in dynamic:
        for unit, stages in (("time", side.stage_ms), ("FLOPs", side.stage_gflops)):
            names.append(f"{unit}\n{side.drop_fraction:g}")
            total = sum(value for stage, value in stages.items() if stage != "whole")
            columns.append({stage: value / total for stage, value in stages.items()})
    bottom = np.zeros(len(names))
    for stage in (stage for stage in dynamic[0].stage_ms if stage != "whole"):
        height = np.array([column.get(stage, 0.0) for column in columns])
        axis.bar(names, height, bottom=bottom, label=stage)
        bottom += height
    axis.set(xlabel="drop fraction", ylabel="share of a forward, by stage", ylim=(0, 1))
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def plot_training(log: Sequence[dict[str, Any]], target: float, path: Path) -> None:
    """The loss and the compression over the steps.

    ``log`` rows hold step, loss, and natural: the kept share before dropping.
    """
    figure, (left, right) = new_figure(1, 2, figsize=(9, 3.2))
    steps = [row["step"] for row in log]
    left.plot(steps, [row["loss"] for row in log], lw=1)
    left.set(xlabel="step", ylabel="diffusion loss", yscale="log")
    right.plot(steps, [1 / row["natural"] for row in log], lw=1, label="positions per kept token")
    right.axhline(target, color="black", ls=":", lw=1, label=f"target N = {target:g}")
    right.set(xlabel="step", ylabel="compression (before dropping)", ylim=(1, None))
    right.legend(fontsize=7)
    figure.savefig(path)


def plot_boundary_maps(columns: Sequence[dict[str, Any]], path: Path, image: str = "input") -> None:
    """One column per noise level: an image (called so), the router's probability, the kept tokens.

    Each column holds title, image (H, W, 3) in [0, 1], prob (H, W) and mask (H, W) bool.
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
    figure.savefig(path)


def plot_sampling(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Over the sampling, from noise to data: the share of the tokens kept in each branch of guidance, and the FLOPs.

    Each run holds name and calls, the records of :class:`dcdit.sample.model_calls.ModelCalls`.
    """
    branches = {"conditional branch": ""}
    if any("kept_null" in call for run in runs for call in run["calls"]):
        branches["unconditional branch"] = "_null"
    figure, axes = new_figure(1, len(branches) + 1, figsize=(4.4 * (len(branches) + 1), 3.6), squeeze=False)
    *shares, flops = axes[0]
    for number, run in enumerate(runs):
        color = f"C{number}"
        for axis, suffix in zip(shares, branches.values(), strict=True):
            calls = [call for call in run["calls"] if f"kept{suffix}" in call]
            times = [call["t"] / 1000 for call in calls]
            axis.plot(times, [call[f"natural{suffix}"] for call in calls], "--", color=color, lw=1, zorder=1)
            axis.plot(times, [call[f"kept{suffix}"] for call in calls], color=color, lw=1.5, label=run["name"])
        times = [call["t"] / 1000 for call in run["calls"]]
        flops.plot(times, [call["gflops"] for call in run["calls"]], color=color, lw=1.5, label=run["name"])
    for axis, title in zip(shares, branches, strict=True):
        axis.set(title=title, ylabel="share of the tokens", ylim=(0, None))
    flops.set(title="cost, all branches", ylabel="GFLOPs per image and call", ylim=(0, None))
    for axis in axes[0]:
        axis.set_xlabel("time (1 noise, 0 data)")
        axis.invert_xaxis()
    shares[0].plot([], [], "--", color="black", lw=1, label="before dropping")
    shares[0].legend(fontsize=7)
    figure.savefig(path)
