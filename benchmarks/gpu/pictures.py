"""Pictures of a report. Without matplotlib the page has none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.found import Found
from benchmarks.gpu.lines import Line
from benchmarks.gpu.plan import Group

COLORS = {
    "exact": "C0",
    "graph, exact": "C3",
    "graph, capacity": "C1",
    "graph, budget": "C2",
    "eager, capacity": "C4",
    "eager, budget": "C5",
}
HOLLOW = {"marker": "D", "mfc": "white", "ls": "none", "ms": 6}


def draw(group: Group, found: Found, path: Path) -> Path | None:
    """The picture of a group; None where there is none to draw, or nothing to draw it with."""
    drawing = _DRAWINGS.get(group.name)
    lines = found.of_group(group)
    if drawing is None or not any("eta" in line or "bytes" in line for line in lines.values()):
        return None
    try:
        from dcdit.profiling.plots import new_figure
    except ImportError:
        return None
    try:
        return drawing(group, found, lines, path, new_figure)
    except ImportError:  # matplotlib is imported when a figure is made
        return None


def _forward(group: Group, found: Found, lines: dict[str, Line], path: Path, new_figure: Callable[..., Any]) -> Path:
    """Left: time over FLOPs with the line eta = 1. Right: eta over the drop fraction, measured and predicted."""
    path = path.with_name(f"{path.stem.rsplit('-', 1)[0]}-{group.name.split()[1]}-{path.stem.rsplit('-', 1)[1]}.png")
    figure, (left, right) = new_figure(1, 2, figsize=(11, 4.2))
    compared = {case: line for case, line in lines.items() if "eta" in line}
    last = next(reversed(compared.values()))
    static_gflops = last["static_flops"] / last["images"] / 1e9
    edge = 1.15 * max([static_gflops, *(line["flops"] / line["images"] / 1e9 for line in compared.values())])
    for number, side in enumerate(("static", "static graph")):
        ms = last["ms"][side]["median"]
        style = {"color": "black", "ls": ("--", ":")[number], "lw": 1}
        left.plot([0, edge], [0, edge * ms / static_gflops], label=f"eta = 1 vs {side}", **style)
        left.plot(static_gflops, ms, "s", color="black", mfc="black" if number else "white")
    for mode, color in COLORS.items():
        own = [(case, line) for case, line in compared.items() if case.partition(", ")[2] == mode]
        drops = sorted(((float(case.split(",")[0].split()[-1]), line) for case, line in own), key=lambda pair: pair[0])
        if not drops:
            continue
        side = "static graph" if mode.startswith("graph") else "static"
        gflops = [line["flops"] / line["images"] / 1e9 for _, line in drops]
        ms = [line["ms"][mode] for _, line in drops]
        errors = [[m["median"] - m["low"] for m in ms], [m["high"] - m["median"] for m in ms]]
        left.errorbar(gflops, [m["median"] for m in ms], errors, fmt="o-", color=color, capsize=2, ms=4, label=mode)
        etas = [line["eta"][side] for _, line in drops]
        errors = [[e["value"] - e["low"] for e in etas], [e["high"] - e["value"] for e in etas]]
        values = [e["value"] for e in etas]
        doubtful = any(line["warnings"] for _, line in drops)
        label = f"{mode} vs {side}{' (unreliable)' if doubtful else ''}"
        right.errorbar([d for d, _ in drops], values, errors, fmt="o-", color=color, capsize=2, ms=4, label=label)
        expected = [(d, found.prediction(group.name, f"drop {d:g}, {mode}").get("eta")) for d, _ in drops]
        known = [(d, eta) for d, eta in expected if eta is not None]
        if known:
            right.plot(*zip(*known, strict=True), color=color, label=f"{mode}, predicted", **HOLLOW)
    left.set(
        xlabel="GFLOPs per image", ylabel=f"ms per forward, batch {last['images']}", xlim=(0, edge), ylim=(0, None)
    )
    left.legend(fontsize=7)
    right.axhline(1, color="black", ls=":", lw=1)
    right.set(xlabel="drop fraction", ylabel="conversion eta", xticks=[0, 0.2, 0.4, 0.6])
    right.set_ylim(0, 1.1 * max(1.0, right.get_ylim()[1]))
    right.legend(fontsize=7, loc="lower left")
    figure.suptitle(f"{group.title}, batch {last['images']}, {found.device}", fontsize=10)
    figure.savefig(path)
    return path


def _operations(
    group: Group, found: Found, lines: dict[str, Line], path: Path, new_figure: Callable[..., Any]
) -> Path | None:
    """The share of the copy bandwidth that each side reaches."""
    if found.gbps is None:
        return None
    names = list(lines)
    figure, axis = new_figure(1, 1, figsize=(9, 0.45 * len(names) + 1.5))
    for number, side in enumerate(("dcdit", "torch.compile")):
        shares = [
            (row + 0.4 * number, line["bytes"] / found.gbps / 1e6 / line["ms"][side]["median"])
            for row, line in enumerate(lines.values())
            if side in line["ms"]
        ]
        if shares:
            axis.barh(*zip(*shares, strict=True), 0.4, label=side)
    axis.axvline(1, color="black", ls=":", lw=1)
    axis.set_yticks([row + 0.2 for row in range(len(names))], names, fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel=f"least bytes / time, as a share of the copy bandwidth ({found.gbps:.0f} GB/s)")
    axis.legend(fontsize=7)
    figure.suptitle(f"{group.title}, {found.device}", fontsize=10)
    figure.savefig(path)
    return path


_DRAWINGS: dict[str, Callable[..., Path | None]] = {
    "forward, large batch": _forward,
    "forward, small batch": _forward,
    "operations": _operations,
}
