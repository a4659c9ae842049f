"""Pictures of results. Matplotlib is an extra (`pip install 'dcdit[demo]'`) and is imported when a picture is drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from dcdit.profile import Profile


def new_figure(*args: Any, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes (as ``plt.subplots``) on the file-only backend, so that no display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = options.pop("figsize")
    figure = Figure(figsize=size, layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(*args, **options)


def plot_profile(result: "Profile", path: Path) -> None:
    """Time against FLOPs with the eta = 1 line through each static model, and the stages of each budget."""
    figure, (left, right) = new_figure(1, 2, figsize=(11, 4.2))
    statics = [side for side in result.sides if side.drop_fraction is None]
    dynamic = [side for side in result.sides if side.drop_fraction is not None]
    edge = 1.1 * max(side.gflops for side in result.sides)
    for number, side in enumerate(statics):
        left.plot(
            [0, edge],
            [0, edge * side.ms / side.gflops],
            "--",
            color=f"C{number}",
            lw=1,
            label=f"eta = 1 vs {side.name}",
        )
        left.plot(side.gflops, side.ms, "s", color=f"C{number}")
    left.plot([s.gflops for s in dynamic], [s.ms for s in dynamic], "o-", color="C3", label=result.model)
    for side in dynamic:
        left.annotate(
            f"drop {side.drop_fraction:g}",
            (side.gflops, side.ms),
            textcoords="offset points",
            xytext=(5, -11),
            fontsize=7,
        )
    left.set(xlabel="GFLOPs per image", ylabel=f"ms per forward, batch {result.batch}", xlim=(0, edge), ylim=(0, None))
    left.legend(fontsize=7)
    bottom = np.zeros(len(dynamic))
    names = [f"drop {side.drop_fraction:g}" for side in dynamic]
    for stage in (stage for stage in dynamic[0].stage_ms if stage != "whole"):
        height = np.array([side.stage_ms[stage] for side in dynamic])
        right.bar(names, height, bottom=bottom, label=stage)
        bottom += height
    right.set(ylabel="ms per forward, by stage")
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(f"{result.model} on {result.device}, {result.dtype}", fontsize=10)
    figure.savefig(path)


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


def plot_boundary_maps(columns: Sequence[dict[str, Any]], path: Path) -> None:
    """One column per noise level: the noisy image, the router's probability, the kept tokens.

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
    for axis, label in zip(axes[:, 0], ("input", "probability", "kept tokens"), strict=True):
        axis.set_ylabel(label, fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(shown, ax=axes[1, -1], fraction=0.046)
    figure.savefig(path)
