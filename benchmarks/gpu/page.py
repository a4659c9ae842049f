"""The page of a report, from whatever lines exist, on any machine: `python -m benchmarks.gpu.page FOLDER`.

Floors stand beside measured times: FLOPs over the rate and bytes over the bandwidth that were measured in the same
report. The column "predicted" is what a model on paper said before (docs/performance-log-predictions.json).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.gpu import pictures
from benchmarks.gpu.found import Found
from benchmarks.gpu.lines import BEGAN, DONE, FAILED, LEFT_OUT, Line, Lines
from benchmarks.gpu.plan import ALL, GROUPS, Group, case_name
from dcdit.utils.files import write_text
from dcdit.utils.tables import markdown_table

PAGE_FILE = "report.md"
LIKE = {"exact": "static", "eager": "static", "official": "static", "graph": "static graph"}
"""The static side that is started in the same way."""
MOST_KERNELS = 25


def write(folder: Path) -> Path:
    """Write the page and its pictures into the folder of a report.

    Raises:
        ValueError: the folder holds no lines.
    """
    by_device: dict[str, dict[str, Line]] = {}
    for line in Lines(folder).read():
        by_device.setdefault(line.get("device", "unknown device"), {})[line["case"]] = line
    if not by_device:
        raise ValueError(f"{folder} holds no lines; accepted: the folder of a report that has begun")
    parts = []
    for number, (device, lines) in enumerate(by_device.items(), start=1):
        parts += _device(Found(device, lines), folder, number)
    page = folder / PAGE_FILE
    write_text(page, "\n\n".join(part for part in parts if part) + "\n")
    return page


def _device(found: Found, folder: Path, number: int) -> list[str]:
    parts = [_head(found), _trouble(found)]
    for group in GROUPS:
        section = _SECTIONS[group.name](found, group)
        if section:
            parts += [f"## {group.title}", *section]
            parts.append(_picture(found, group, folder / f"{group.name.split(',')[0]}-{number}.png"))
    return parts


def _picture(found: Found, group: Group, path: Path) -> str:
    """The picture of a group. One that cannot be drawn must not cost the page."""
    try:
        picture = pictures.draw(group, found, path)
    except Exception as error:
        return f"No picture: {type(error).__name__}: {error}"
    return f"![{group.title}]({picture.name})" if picture else ""


def _head(found: Found) -> str:
    times = [line["at"] for line in found.lines.values()]
    day = datetime.fromtimestamp(min(times), UTC).strftime("%F")
    copy = found.done("ceilings", "copy")
    machine = ", ".join(f"{name} {value}" for name, value in copy["machine"].items()) if copy else "not recorded"
    rehearsal = "**A rehearsal on a CPU with tiny models: its numbers mean nothing.**\n\n"
    return (
        f"# DC-DiT on {found.device}, {day}\n\n{rehearsal if 'rehearsal' in found.device else ''}"
        f"Machine: {machine}. Every comparison was checked for equal results before it was timed, and its sides ran "
        "in turns. Times are medians, with the quartiles in brackets. eta = (time static / time dynamic) / (FLOPs "
        "static / FLOPs dynamic): 1 means that every saved FLOP became time. Its interval holds the true median with "
        "a probability of at least 95 %. Floors are FLOPs over the rate and bytes over the bandwidth that were "
        "measured here; predictions are those of a model on paper."
    )


def _trouble(found: Found) -> str:
    """What failed, was cut, left out or not run. A reader has to see it first."""
    rows = []
    for case, line in found.lines.items():
        if line["state"] == FAILED:
            rows.append(f"- **failed**: {case}: {_one_line(line['error'])}")
        elif line["state"] == BEGAN:
            rows.append(f"- cut: {case} was running when its process ended")
        elif line["state"] == LEFT_OUT and "::" not in case:
            rows.append(f"- left out: {case}: {line['reason']}")
    for group in GROUPS:
        missing = [case for case in group.cases if case_name(group.name, case) not in found.lines]
        if missing:
            rows.append(f"- not run: {group.name}: {'; '.join(missing)}")
    return "\n".join(["What is not in this report:", "", *rows]) if rows else ""


def _one_line(text: str, most: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + " ..."


def _tests(found: Found, group: Group) -> list[str]:
    tests = {case.removeprefix("tests: "): line for case, line in found.lines.items() if "::" in case}
    if not tests:
        return []
    by_file: dict[str, Counter[str]] = {}
    for name, line in tests.items():
        by_file.setdefault(name.partition("::")[0], Counter())[line["state"]] += 1
    rows = [[file, *(str(counts[state]) for state in (DONE, FAILED, LEFT_OUT))] for file, counts in by_file.items()]
    whole = found.done(group.name, ALL)
    return [
        "All tests ran." if whole else "Not all tests ran: the time was over.",
        markdown_table(["file", "passed", "failed", "skipped"], rows),
    ]


def _ceilings(found: Found, group: Group) -> list[str]:
    rows = []
    copy, product = found.done(group.name, "copy"), found.done(group.name, "product")
    if copy:
        rows.append(["copy of 2 GiB, read and write counted", _figure(copy["gbps"], ".0f"), "GB/s"])
    if product:
        rows.append(["matrix product", _figure(product["tflops"], ".0f"), "TFLOP/s"])
    return [markdown_table(["what", "measured", "unit"], rows)] if rows else []


def _forward(found: Found, group: Group) -> list[str]:
    parts = []
    static = found.done(group.name, "static")
    if static:
        rows = [
            [form, _figure(ms, ".3f"), _number(found.prediction(group.name, f"static, {form}").get("ms"), ".2f")]
            for form, ms in static["ms"].items()
        ]
        parts += [
            "The static DiT (patches of 2) in its forms; comparisons take the fastest one with and without a graph.",
            markdown_table(["static", "ms", "predicted ms"], rows),
        ]
    compared = {case: line for case, line in found.of_group(group).items() if "eta" in line}
    if compared:
        parts.append(_comparisons(found, group, compared))
        parts.append(_doubts(compared))
    staged = {case: line for case, line in compared.items() if line.get("stage_ms")}
    if staged:
        rows = [
            [stage, *(f"{line['stage_ms'][stage]:.3f} ±{line['stage_spread'][stage]:.0%}" for line in staged.values())]
            for stage in next(iter(staged.values()))["stage_ms"]
        ]
        parts += ["Milliseconds by stage, with events between the stages:", markdown_table(["stage", *staged], rows)]
    for case in ("kernels of drop 0, exact", "kernels of static"):
        line = found.done(group.name, case)
        if line:
            parts.append(_kernels(case, line))
    return parts


def _comparisons(found: Found, group: Group, compared: dict[str, Line]) -> str:
    head = ["DC-DiT", "kept", "GFLOPs/image", "ms", "n", "static ms", "eta", "eta vs static graph", "floor ms"]
    head += ["predicted ms", "predicted eta"]
    rows = []
    for case, line in sorted(compared.items(), key=lambda item: float(item[0].split(",")[0].split()[-1])):
        mode = case.partition(", ")[2]
        like = LIKE[mode.partition(",")[0]]
        expected = found.prediction(group.name, case)
        floor = line["flops"] / found.tflops / 1e9 if found.tflops else None
        rows.append(
            [
                case,
                f"{line['kept']:.1%}",
                f"{line['flops'] / line['images'] / 1e9:.1f}",
                _figure(line["ms"][mode], ".3f"),
                str(line["ms"][mode]["n"]),
                _figure(line["ms"][like], ".3f"),
                _eta(line, like),
                _eta(line, "static graph"),
                _number(floor, ".3f"),
                _number(expected.get("ms"), ".2f"),
                _number(expected.get("eta"), ".2f"),
            ]
        )
    return markdown_table(head, rows)


def _operations(found: Found, group: Group) -> list[str]:
    head = ["operation", "MB", "floor us", "dcdit us", "of the copy", "torch.compile us", "times faster", "by"]
    rows, notes = [], []
    for case, line in found.of_group(group).items():
        ours = line["ms"]["dcdit"]
        floor = line["bytes"] / found.gbps / 1e3 if found.gbps else None
        row = [case, f"{line['bytes'] / 1e6:.2f}", _number(floor, ".2f"), _figure(ours, ".2f", 1e3)]
        row.append(_number(floor / ours["median"] / 1e3 if floor else None, ".0%"))
        if line["by"] == "graph":
            row += [_figure(line["ms"]["torch.compile"], ".2f", 1e3), _ratio(line)]
        else:
            events = line["event_ms"]
            both = all(events.values())
            row += [
                _figure(events["torch.compile"], ".2f", 1e3) if both else _number(None, ".2f"),
                _number(events["torch.compile"]["median"] / events["dcdit"]["median"] if both else None, ".2f"),
            ]
            graph = "dcdit's own time is that in a graph, where one can hold it"
            notes.append(f"- {case}: {line['why']}; both sides timed by events; {graph}.")
        rows.append([*row, line["by"]])
    if not rows:
        return []
    small = "Bytes are the least possible: each input read once, each output written once."
    return [small, markdown_table(head, rows), "\n".join(notes), _doubts(found.of_group(group))]


def _training(found: Found, group: Group) -> list[str]:
    compared = {case: line for case, line in found.of_group(group).items() if "eta" in line}
    if not compared:
        return []
    names = list(next(iter(compared.values()))["ms"])
    against = list(next(iter(compared.values()))["eta"])
    head = ["drop", "kept", *(f"{name}, ms" for name in names), *(f"eta against {name}" for name in against)]
    head += ["peak GiB", "predicted ms", "predicted eta"]
    rows = []
    for case, line in sorted(compared.items(), key=lambda item: (item[0].endswith("graphs"), item[0])):
        expected = found.prediction(group.name, case)
        rows.append(
            [
                case.removeprefix("drop "),
                f"{line['kept']:.1%}",
                *(_figure(line["ms"][name], ".2f") for name in names),
                *(_eta(line, name) for name in against),
                _number(line["peak_gib"].get("DC-DiT"), ".1f"),
                _number(expected.get("ms"), ".1f"),
                _number(expected.get("eta"), ".2f"),
            ]
        )
    about = "float32 weights, autocast, clipping, fused AdamW, averaged weights. FLOPs count three forwards."
    return [about, markdown_table(head, rows), _doubts(compared)]


def _kernels(case: str, line: Line) -> str:
    rows = [
        [f"`{row['kernel'][:70]}`", f"{row['launches']:.1f}", f"{row['us']:.1f}", f"{row['us'] / line['us']:.1%}"]
        for row in line["kernels"][:MOST_KERNELS]
    ]
    title = f"{case[0].upper()}{case[1:]}: {line['launches']:.0f} launches, {line['us'] / 1e3:.2f} ms in kernels."
    return f"{title}\n\n{markdown_table(['kernel', 'launches', 'us per forward', 'share'], rows)}"


def _doubts(lines: dict[str, Line]) -> str:
    """Why some of these cases cannot be relied on."""
    rows = [f"- {case}: {'; '.join(line['warnings'])}" for case, line in lines.items() if line.get("warnings")]
    return "\n".join(["UNRELIABLE, their eta or ratio is not printed:", "", *rows]) if rows else ""


def _eta(line: Line, side: str) -> str:
    return _interval(line["eta"][side], bool(line["warnings"]))


def _ratio(line: Line) -> str:
    return _interval(line["ratio"], bool(line["warnings"]))


def _interval(ratio: dict[str, float], doubtful: bool) -> str:
    value = "unreliable" if doubtful else f"{ratio['value']:.2f}"
    return f"{value} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _figure(figure: dict[str, float], spec: str, factor: float = 1.0) -> str:
    low, middle, high = (factor * figure[name] for name in ("low", "median", "high"))
    return f"{middle:{spec}} ({low:{spec}} to {high:{spec}})"


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else f"{value:{spec}}"


_SECTIONS = {
    "tests": _tests,
    "ceilings": _ceilings,
    "forward, large batch": _forward,
    "forward, small batch": _forward,
    "operations": _operations,
    "training": _training,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a report")
    args = parser.parse_args(argv)
    try:
        page = write(args.folder)
    except (ValueError, OSError) as error:
        print(f"gpu-report: error: {error}", file=sys.stderr)
        return 2
    print(f"gpu-report: wrote {page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
