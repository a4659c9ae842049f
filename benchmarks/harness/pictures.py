"""Pictures of a report: how many times faster models and operations are, and how their cost grows with the grid."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcdit.profiling.plots import new_figure, plot_times_faster

Row = dict[str, Any]
NAN = float("nan")


def plot_models(groups: dict[str, list[Row]], path: Path) -> None:
    """How many times faster each variant of every group is than each static model; diamonds: in FLOPs."""
    tallest = max(map(len, groups.values()))
    figure, axes = new_figure(1, len(groups), figsize=(5.5 * len(groups), 0.5 * tallest + 1.5), squeeze=False)
    for axis, (title, rows) in zip(axes[0], groups.items(), strict=True):
        statics = [row for row in rows if row["kept_fraction"] is None]
        dynamic = [row for row in rows if row["kept_fraction"] is not None]
        faster = {f"than {one['variant']}": [one["ms"] / row["ms"] for row in dynamic] for one in statics}
        cheaper = {f"than {one['variant']}": [one["gflops"] / row["gflops"] for row in dynamic] for one in statics}
        plot_times_faster(axis, [row["variant"] for row in dynamic], faster, cheaper)
        axis.set(xlabel="times faster")
        axis.set_title(title, fontsize=9, pad=24)
    figure.savefig(path)


def plot_operations(rows: Sequence[Row], copy_gbps: float, path: Path) -> None:
    """How many times faster than the other variants each operation is, forward, and its share of the copy bandwidth."""
    ours = {row["op"]: row for row in rows if row["variant"] == "dcdit"}
    others = [variant for variant in dict.fromkeys(row["variant"] for row in rows) if variant != "dcdit"]
    ms = {(row["op"], row["variant"]): row["ms"] for row in rows}
    faster = {f"than {other}": [ms.get((op, other), NAN) / ours[op]["ms"] for op in ours] for other in others}
    figure, (left, right) = new_figure(1, 2, figsize=(13, 0.45 * len(ours) + 1.6), width_ratios=(3, 2), sharey=True)
    plot_times_faster(left, list(ours), faster)
    values = [value for column in faster.values() for value in column if value == value]
    left.set(xlabel=f"times faster, {rows[0]['label']}, forward", xscale="log")
    left.set_xlim(0.8 * min(1.0, *values), 1.6 * max(1.0, *values))
    left.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    left.xaxis.set_minor_formatter(lambda value, position: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    right.barh(range(len(ours)), [row["copy_share"] for row in ours.values()], 0.7, color="C2")
    right.axvline(1, color="black", ls=":", lw=1)
    right.set(xlabel=f"dcdit's share of the copy bandwidth ({copy_gbps:.1f} GB/s)")
    right.xaxis.set_major_formatter(lambda value, position: f"{value:.0%}")
    figure.savefig(path)


def plot_scaling(rows: Sequence[Row], path: Path) -> None:
    """Time per position over the side of the grid, a panel for each operation: flat is linear."""
    names = list(dict.fromkeys(row["op"] for row in rows))
    columns = min(5, len(names))
    lines = math.ceil(len(names) / columns)
    figure, axes = new_figure(lines, columns, figsize=(2.7 * columns, 2 * lines + 0.4), squeeze=False, sharex=True)
    for axis, name in zip(axes.flat, names, strict=False):
        highest = 0.0
        for number, direction in enumerate(("forward", "forward+backward")):
            for row in (row for row in rows if (row["op"], row["direction"]) == (name, direction)):
                sides, times = [int(side) for side in row["ns_per_position"]], list(row["ns_per_position"].values())
                axis.plot(sides, times, "o-", color=f"C{number}", ms=3, label=direction)
                highest = max(highest, *times)
        axis.set_title(name, fontsize=8)
        axis.set(xscale="log", ylim=(0, 1.15 * highest))
        axis.set_xticks(sides, [f"{side}²" for side in sides], fontsize=7)
        axis.minorticks_off()
        axis.tick_params(axis="y", labelsize=7)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("ns per position", fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=2)
    figure.savefig(path)
