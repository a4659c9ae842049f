"""Pictures of a report: time against FLOPs, shares of the copy bandwidth, scaling with the grid."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcdit.profiling.plots import new_figure

Row = dict[str, Any]


def plot_models(groups: dict[str, list[Row]], path: Path) -> None:
    """Time against FLOPs of every group, with the eta = 1 line through each static model."""
    figure, axes = new_figure(1, len(groups), figsize=(5 * len(groups), 4), squeeze=False)
    for axis, (title, rows) in zip(axes[0], groups.items(), strict=True):
        edge = 1.1 * max(row["gflops"] for row in rows)
        statics = [row for row in rows if row["kept_fraction"] is None]
        for number, row in enumerate(statics):
            slope = row["ms"] / row["gflops"]
            label = f"eta = 1 vs {row['variant']}"
            axis.plot([0, edge], [0, slope * edge], "--", color=f"C{number}", lw=1, label=label)
            axis.plot(row["gflops"], row["ms"], "s", color=f"C{number}")
        dynamic = [row for row in rows if row["kept_fraction"] is not None]
        for name, marker, ours in (("dcdit", "o", True), ("reference implementation", "x", False)):
            found = [row for row in dynamic if row["variant"].startswith("official") is not ours]
            if found:
                axis.plot([r["gflops"] for r in found], [r["ms"] for r in found], marker, color="C3", label=name)
            for row in found:
                point = (row["gflops"], row["ms"])
                axis.annotate(row["variant"], point, textcoords="offset points", xytext=(5, -10), fontsize=6)
        axis.set(xlabel="GFLOPs per image", ylabel="ms", title=title, xlim=(0, edge), ylim=(0, None))
        axis.legend(fontsize=6)
    figure.savefig(path)


def plot_roofline(rows: Sequence[Row], copy_gbps: float, path: Path) -> None:
    """Share of the copy bandwidth that each variant of each operation reaches, forward, at the first size."""
    names = list(dict.fromkeys(row["op"] for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    figure, axis = new_figure(1, 1, figsize=(9, 0.4 * len(names) + 1.5))
    height = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        shares = {row["op"]: row["copy_share"] for row in rows if row["variant"] == variant}
        positions = [i + number * height for i, name in enumerate(names) if name in shares]
        axis.barh(positions, [shares[name] for name in names if name in shares], height, label=variant)
    axis.axvline(1, color="black", ls=":", lw=1)
    axis.set_yticks([i + 0.4 - height / 2 for i in range(len(names))], names, fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel=f"share of the copy bandwidth ({copy_gbps:.1f} GB/s), {rows[0]['label']}, forward")
    axis.legend(fontsize=7)
    figure.savefig(path)


def plot_scaling(rows: Sequence[Row], path: Path) -> None:
    """Time per position over the number of positions of the grid, log axes: flat is linear."""
    figure, axes = new_figure(1, 2, figsize=(13, 4.5), sharey=True)
    names = list(dict.fromkeys(row["op"] for row in rows))
    for axis, direction in zip(axes, ("forward", "forward+backward"), strict=True):
        for row in (row for row in rows if row["direction"] == direction):
            sides = [int(side) for side in row["ns_per_position"]]
            number = names.index(row["op"])
            style = "o-" if number < 10 else "s--"
            times = list(row["ns_per_position"].values())
            axis.plot([side**2 for side in sides], times, style, color=f"C{number}", ms=3, label=row["op"])
        axis.set(xscale="log", yscale="log", xlabel="positions of the grid", title=direction)
    axes[0].set(ylabel="ns per position")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=6, loc="outside right center")
    figure.savefig(path)
