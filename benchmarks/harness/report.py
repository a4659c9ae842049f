"""Raw results to a page: `python -m benchmarks.harness.report RAW.json [RAW.json ...] [--out benchmarks/results]`.

Reads what `pytest benchmarks/ --benchmark-only --benchmark-json RAW.json` and `python -m benchmarks.bench_scaling`
write. Writes <device>-<date>.md and its pictures. The cell of a value that was not measured is empty.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.harness import pictures
from dcdit.nn import STAGES
from dcdit.profiling.reliability import DISAGREEMENT
from dcdit.utils.tables import markdown_table

Row = dict[str, Any]
SCALING_FROM, SCALING_TO = "32", "256"
LOW_ETA = 0.9
"""Below it the page says where the time went."""
FORMER_KEYS = {"side": "variant", "case": "label", "kept_share": "kept_fraction", "growth": "scaling"}
"""Keys in results of earlier versions, and what they are called now."""


def read(paths: Sequence[Path]) -> dict[str, Any]:
    """The results of several files together.

    Returns:
        ``conditions`` of the first file, ``left_out``, ``day``, and the rows ``op``, ``model``, ``scaling``.

    Raises:
        ValueError: a file that is not a result of these benchmarks, or results of two devices, dtypes or thread counts.
    """
    found: dict[str, Any] = {"op": [], "model": [], "scaling": [], "left_out": {}, "day": date.today().isoformat()}
    for path in paths:
        try:
            raw = _renamed(json.loads(path.read_text()))
            conditions = raw["dcdit"]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} holds no results; accepted: JSON of the benchmarks or of bench_scaling") from None
        first = found.setdefault("conditions", conditions)
        for name in ("device", "dtype", "threads"):
            if conditions[name] != first[name]:
                raise ValueError(f"{path} has {name} {conditions[name]}; accepted: {first[name]}, as in {paths[0]}")
        found["left_out"].update(conditions["left_out"])
        found["day"] = raw.get("datetime", found["day"])[:10]
        for benchmark in raw.get("benchmarks", []):
            row = _renamed(benchmark["extra_info"])
            found[row["kind"]].append(row)
        found["scaling"] += raw.get("scaling", [])
    return found


def _renamed(row: Row) -> Row:
    return {FORMER_KEYS.get(key, key): value for key, value in row.items()}


def write(found: dict[str, Any], folder: Path) -> Path:
    """The page and its pictures."""
    conditions = found["conditions"]
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", conditions["device"]).strip("-")
    page = folder / f"{slug}-{found['day']}.md"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_head(found)]
    if found["model"]:
        parts.append(_models(_grouped(found["model"]), page))
    if found["op"]:
        parts.append(_ops(found["op"], conditions["copy_gbps"], page))
    if found["scaling"]:
        parts.append(_scaling(found["scaling"], page))
    page.write_text("\n\n".join(parts) + "\n")
    return page


def _head(found: dict[str, Any]) -> str:
    conditions = found["conditions"]
    left_out = [f"- Left out: {name} ({reason})." for name, reason in found["left_out"].items()]
    spread = f" (±{conditions['copy_spread']:.0%})" if "copy_spread" in conditions else ""
    return "\n".join(
        [
            f"# Benchmarks on {conditions['device']}, {found['day']}",
            "",
            f"- {conditions['threads']} threads, torch {conditions['torch']}, {conditions['dtype']}, "
            f"set {conditions['set']}. Copy bandwidth in this run: {conditions['copy_gbps']:.1f} GB/s{spread}.",
            "- Every variant computed the same before it was timed. Times are medians; an empty cell was not measured.",
            *left_out,
        ]
    )


def _grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['scale']}, {row['size']} px, batch {row['batch']}, {row['direction']}", []).append(row)
    return groups


def etas(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Conversion of every dynamic variant against every static one of a group."""
    statics = [row for row in rows if row["kept_fraction"] is None]
    return {
        row["variant"]: {s["variant"]: (s["ms"] / row["ms"]) / (s["gflops"] / row["gflops"]) for s in statics}
        for row in rows
        if row["kept_fraction"] is not None
    }


def _models(groups: dict[str, list[Row]], page: Path) -> str:
    picture = page.with_name(f"{page.stem}-models.png")
    pictures.plot_models(groups, picture)
    parts = [
        "## Models",
        "eta = (time static / time dynamic) / (FLOPs static / FLOPs dynamic): 1 means that every saved FLOP became "
        "time. A training step counts three forwards; the optimizer in it costs the same whatever is kept. "
        "The spread is half the interquartile range over the median.",
        f"![times faster than the static models]({picture.name})",
    ]
    for title, rows in groups.items():
        conversion = etas(rows)
        statics = [row["variant"] for row in rows if row["kept_fraction"] is None]
        head = ["variant", "kept", "GFLOPs/image", "ms", "spread", "images/s", "peak MiB"]
        head += [f"eta vs {name}" for name in statics]
        noisy = [row["variant"] for row in rows if row.get("spread", 0.0) > DISAGREEMENT]
        stepping = any(row["optimizer_ms"] for row in rows)
        head += ["optimizer ms"] * stepping
        body = [
            [
                row["variant"],
                _number(row["kept_fraction"], ".1%"),
                _number(row["gflops"], ".2f"),
                _number(row["ms"], ".1f"),
                _number(row.get("spread"), ".1%"),
                _number(row["images_per_s"], ".2f"),
                _mebibytes(row["peak_bytes"]),
                *(_eta(conversion.get(row["variant"], {}).get(name), noisy) for name in statics),
                *([_spread(row["optimizer_ms"], row.get("optimizer_spread"), ".1f")] * stepping),
            ]
            for row in rows
        ]
        parts += [f"### {title}"]
        if noisy:
            parts += [f"UNRELIABLE: the times of {', '.join(noisy)} scatter by more than ±{DISAGREEMENT:.0%}."]
        parts += [markdown_table(head, body)]
        staged = [row for row in rows if row["stage_ms"]]
        if staged:
            parts += ["Milliseconds by stage:", _stages(staged)]
        reasons = [_reason(row, rows, conversion[row["variant"]]) for row in rows if row["variant"] in conversion]
        if any(reasons) and not noisy:
            parts += ["\n".join(f"- {reason}" for reason in reasons if reason)]
    return "\n\n".join(parts)


def _eta(value: float | None, noisy: Sequence[str]) -> str:
    """A cell; an eta next to times that scatter too much is not printed."""
    return "unreliable" if noisy and value is not None else _number(value, ".2f")


def _reason(row: Row, rows: Sequence[Row], conversion: dict[str, float]) -> str:
    """Where the time of a variant goes whose eta is low; empty for the others."""
    if not conversion or min(conversion.values()) >= LOW_ETA:
        return ""
    name = min(conversion, key=lambda static: conversion[static])
    static = next(other for other in rows if other["variant"] == name)
    per_gflop = static["ms"] / static["gflops"]
    excess = {
        stage: ms - per_gflop * row["stage_gflops"].get(stage, 0.0)
        for stage, ms in (row["stage_ms"] or {}).items()
        if stage != "whole"
    }
    if row["optimizer_ms"]:
        excess["optimizer"] = row["optimizer_ms"] - static["optimizer_ms"] * row["gflops"] / static["gflops"]
    worst = sorted((stage for stage in excess if excess[stage] > 0), key=lambda stage: -excess[stage])[:3]
    named = ", ".join(f"{stage} {excess[stage]:+.1f} ms" for stage in worst) or "no stage that was timed"
    total = row["ms"] - per_gflop * row["gflops"]
    return (
        f"{row['variant']}: eta {conversion[name]:.2f} against {name}, {total:.1f} ms above that model's time per "
        f"FLOP. By stage: {named}."
    )


def _stages(rows: Sequence[Row]) -> str:
    head = ["stage", *(row["variant"] for row in rows)]
    body = [
        [stage, *(_spread(row["stage_ms"].get(stage), row["stage_spread"].get(stage), ".2f") for row in rows)]
        for stage in (*STAGES, "whole")
    ]
    covered = [sum(row["stage_ms"].get(stage, 0.0) for stage in STAGES) / row["stage_ms"]["whole"] for row in rows]
    return markdown_table(head, [*body, ["stages / whole", *(f"{share:.1%}" for share in covered)]])


def _ops(rows: Sequence[Row], copy_gbps: float, page: Path) -> str:
    picture = page.with_name(f"{page.stem}-ops.png")
    first = [row for row in rows if row["direction"] == "forward" and row["label"] == rows[0]["label"]]
    pictures.plot_operations(first, copy_gbps, picture)
    parts = [
        "## Operations",
        "Bytes are the least possible: each input read once, each output written once. The share is of the copy "
        "bandwidth; data that a cache holds can pass 100 %. Host: one call on tiny tensors.",
        f"![times faster than the others, and share of the copy bandwidth]({picture.name})",
    ]
    for label in dict.fromkeys(row["label"] for row in rows):
        here = [row for row in rows if row["label"] == label]
        others = [variant for variant in dict.fromkeys(row["variant"] for row in here) if variant != "dcdit"]
        parts += [f"### {label}, batch {here[0]['batch']}", _op_table(here, others)]
    return "\n\n".join(parts)


def _op_table(rows: Sequence[Row], others: Sequence[str]) -> str:
    head = [
        "operation", "dcdit ms", *(f"{name} ms" for name in others), *(f"vs {name}" for name in others), "spread",
        "GB/s", "of copy", "GFLOP/s", "graph ms", "peak MiB", "plain peak MiB", "launches", "syncs", "host us",
    ]  # fmt: skip
    body = []
    for op, direction in dict.fromkeys((row["op"], row["direction"]) for row in rows):
        variants = {row["variant"]: row for row in rows if (row["op"], row["direction"]) == (op, direction)}
        if "dcdit" not in variants:
            continue
        ours = variants["dcdit"]
        body.append(
            [
                f"{op} {direction}",
                _number(ours["ms"], ".3f"),
                *(_number(variants.get(name, {}).get("ms"), ".3f") for name in others),
                *(_number(variants[name]["ms"] / ours["ms"] if name in variants else None, ".1fx") for name in others),
                _number(max((row["spread"] for row in variants.values() if "spread" in row), default=None), ".0%"),
                _number(ours["gbps"], ".1f"),
                _number(ours["copy_share"], ".0%"),
                _number(ours["gflops_per_s"], ".1f"),
                _spread(ours["graph_ms"], ours["graph_spread"], ".3f"),
                _mebibytes(ours["peak_bytes"]),
                _mebibytes(variants.get("plain", {}).get("peak_bytes")),
                _number(ours["launches"], "d"),
                _number(ours["host_syncs"], "d"),
                _number(ours["host_us"], ".0f"),
            ]
        )
    return markdown_table(head, body)


def _scaling(rows: Sequence[Row], page: Path) -> str:
    picture = page.with_name(f"{page.stem}-scaling.png")
    pictures.plot_scaling(rows, picture)
    grids = list(rows[0]["ns_per_position"])
    head = ["operation", *(f"{side}x{side}" for side in grids), f"{SCALING_TO} / {SCALING_FROM}", "spread"]
    body, noisy = [], []
    for row in rows:
        ns = row["ns_per_position"]
        ratio = ns[SCALING_TO] / ns[SCALING_FROM] if {SCALING_FROM, SCALING_TO} <= ns.keys() else None
        name, spread = f"{row['op']} {row['direction']}", max(row["spread"].values()) if "spread" in row else None
        noisy += [name] if spread is not None and spread > DISAGREEMENT else []
        body.append([name, *(f"{ns[side]:.1f}" for side in grids), _number(ratio, ".2f"), _number(spread, ".0%")])
    return "\n\n".join(
        [
            "## Scaling with the grid",
            *(
                [f"UNRELIABLE: the times of {', '.join(noisy)} scatter by more than ±{DISAGREEMENT:.0%}."]
                if noisy
                else []
            ),
            f"Nanoseconds per position, width {rows[0]['width']}, {rows[0]['keep']:.0%} kept. Every grid has as many "
            "images as make the same number of positions: equal numbers in a row are a cost linear in the grid. The "
            "spread is half the interquartile range over the median, the largest of a row.",
            f"![time per position]({picture.name})",
            markdown_table(head, body),
        ]
    )


def _spread(ms: float | None, spread: float | None, spec: str) -> str:
    """A cell: a time and how far it scatters."""
    return _number(ms, spec) + ("" if ms is None or spread is None else f" ±{spread:.0%}")


def _number(value: float | None, spec: str) -> str:
    if value is None:
        return ""
    return f"{value:{spec.removesuffix('x')}}" + ("x" if spec.endswith("x") else "")


def _mebibytes(value: float | None) -> str:
    return _number(None if value is None else value / 2**20, ".1f")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", nargs="+", type=Path, help="JSON of the benchmarks and of bench_scaling")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        page = write(read(args.raw), args.out)
    except (ValueError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
