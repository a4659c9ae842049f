"""What the benchmarks print at their end: how many times faster dcdit is, from the medians of the same run."""

from collections.abc import Sequence
from typing import Any

from dcdit.utils.tables import markdown_table

Row = dict[str, Any]


def summarise(rows: Sequence[Row]) -> str:
    """The tables of the rows that were measured; empty where there is nothing to compare.

    Args:
        rows: ``extra_info`` of the benchmarks.
    """
    ops = _ops([row for row in rows if row["kind"] == "op"])
    models = _models([row for row in rows if row["kind"] == "model"])
    return "\n\n".join(filter(None, [models, ops]))


def _ops(rows: Sequence[Row]) -> str:
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["direction"], row["label"]), {})[row["variant"]] = row
    cases = {case: variants for case, variants in cases.items() if "dcdit" in variants and len(variants) > 1}
    others = list(dict.fromkeys(name for variants in cases.values() for name in variants if name != "dcdit"))
    body = [
        [" ".join(case), f"{variants['dcdit']['ms']:.3f}", *_faster(variants["dcdit"], variants, others)]
        for case, variants in cases.items()
    ]
    return _table("dcdit is so many times faster than", ["operation", "ms"], others, body)


def _models(rows: Sequence[Row]) -> str:
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = row["scale"], f"{row['size']}px", f"batch {row['batch']}", row["direction"]
        groups.setdefault(key, {})[row["variant"]] = row
    statics = list(dict.fromkeys(row["variant"] for row in rows if row["kept_fraction"] is None))
    body = [
        [" ".join((*key, variant)), f"{row['ms']:.1f}", *_faster(row, variants, statics)]
        for key, variants in groups.items()
        for variant, row in variants.items()
        if row["kept_fraction"] is not None
    ]
    return _table("a DC-DiT is so many times faster than", ["model", "ms"], statics, body)


def _faster(row: Row, variants: dict[str, Row], others: Sequence[str]) -> list[str]:
    """A cell for each of the others, and the largest spread of all that are compared."""
    compared = [variants[name] for name in others if name in variants]
    cells = [f"{variants[name]['ms'] / row['ms']:.2f}" if name in variants else "" for name in others]
    return [*cells, f"±{max(each['spread'] for each in (row, *compared)):.0%}"]


def _table(title: str, head: Sequence[str], others: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join([f"{title}:", markdown_table([*head, *others, "spread"], body)]) if body and others else ""
