"""The page of the study of equal compute: curves, crossings, what chooses tokens, where they go."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies import cifar10
from benchmarks.studies.comparison import Results, by_way, first, loss_table, routing_table, way_of
from benchmarks.studies.frequencies import BANDS
from dcdit.profiling.plots import new_figure, plain_ticks
from dcdit.utils.images import grid
from dcdit.utils.tables import markdown_table

DATA = {
    "cifar": "CIFAR-10, 32 x 32 pixels",
    "digits": "Digits on empty canvases, 32 x 32 pixels",
    "photographs": "Crops of six photographs, 64 x 64 pixels",
}
OURS, STATIC = "dc-dit", ("static-flops", "static-parameters")
DYNAMIC = (OURS, "dithered+context")
"""The paper's DC-DiT, and the one of our own whose curve is shown beside it."""
MARKS = (1e13, 2e13, 3e13, 6e13, 1e14, 1.5e14, 2e14, 2.4e14, 2.8e14, 4e14, 5.3e14, 1e15, 3e15)
"""Training FLOPs at which the curves are compared."""
FORGOTTEN = 2.5
"""Averaged weights have forgotten the start after this many times 1 / (1 - ema_decay) steps: they hold 8 % of it."""
COLORS = {name: f"C{number}" for number, name in enumerate((OURS, *STATIC, *DYNAMIC[1:]))}
SHOWN_SAMPLES, COLORS_OF_SHEET = 8, 256
FAR = 20
"""Per cent off the DC-DiT: another objective has losses of another size, which no picture shows beside it."""
LEGEND_ROWS = 20

Runs = dict[str, list[dict[str, Any]]]
"""Run -> its lines, from the shortest to the longest."""
Curve = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""FLOPs and losses."""
Curves = Mapping[str, Curve]
"""Seed -> the curve of one way."""


def read_lines(files: Sequence[Path]) -> Runs:
    """The lines of all calls. A run that several calls began anew keeps its line for each number of FLOPs reached."""
    runs: Runs = {}
    for line in (json.loads(text) for file in files for text in file.read_text().splitlines()):
        runs.setdefault(line.pop("run"), []).append(line)
    return {run: sorted(lines, key=lambda line: line["training_flops"]) for run, lines in runs.items()}


def write_page(runs: Runs, command: str, out: Path) -> Path:
    """Write report.md, its pictures, and study.json with the numbers behind them."""
    out.mkdir(parents=True, exist_ok=True)
    goals = sorted({line["goal"] for lines in runs.values() for line in lines})
    machines = dict.fromkeys(line["machine"] for lines in runs.values() for line in lines)
    parts = [
        "# Small models at equal training compute",
        f"Small models on small images, trained to {' or '.join(f'{g:.0e}' for g in goals)} "
        "training FLOPs (three forwards a step, counted from the tokens that were kept). Losses are of held-out images "
        f"at {len(cifar10.NOISE_LEVELS)} noise levels, the same noise for all, averaged weights; `±` is half the range "
        "over the seeds. Runs shared a machine: nothing here is a time. What the numbers say: [README.md](README.md).",
        f"Machine: {'; '.join(machines)}. Command: `{command}`.",
    ]
    for data, title in DATA.items():
        mine = {run.partition("-")[2]: lines for run, lines in runs.items() if run.startswith(f"{data}-")}
        if mine:
            parts += [f"# {title}", *_parts(mine, data, goals, out)]
    page = out / "report.md"
    page.write_text("\n\n".join(parts) + "\n")
    shown = {run: [_numbers(line) for line in lines] for run, lines in runs.items()}
    (out / "study.json").write_text(json.dumps({"command": command, "runs": shown}) + "\n")
    return page


def _parts(runs: Runs, data: str, goals: Sequence[float], out: Path) -> list[str]:
    """The sections of one set of images."""
    main = {run: lines for run, lines in runs.items() if way_of(run) in COLORS}
    parts = _curve_parts(main, data, goals, out) if len({way_of(run) for run in main}) > 1 else []
    for goal in goals:
        reached = at_goal(runs, goal)
        if reached:
            parts += [f"## Every run at {goal:.0e} training FLOPs", loss_table(reached), _cost_table(reached)]
            if goal == goals[0] and any(way_of(run) == OURS for run in reached):
                _plot_variants(reached, out / f"{data}-variants.png")
                parts.append(f"![loss of each way against {OURS}, by noise level]({data}-variants.png)")
            parts += _band_parts(reached)
    stopped = {run: lines[-1] for run, lines in runs.items() if lines[-1]["training_flops"] < lines[-1]["goal"]}
    if stopped:
        parts += [
            "## Runs that were stopped before their goal",
            "Their loss at their last record, and that of the runs with the same seed at as many FLOPs, both from the "
            "curves. Those of models that predict the clean image (`+clean`) count noise levels below 0.05 for less, "
            "here only.",
            _stopped_table(stopped, runs),
        ]
    shown = at_first_goal(runs, goals[0])
    routed = {run: line for run, line in shown.items() if "routing" in line}
    if routed:
        parts += [
            "## Where the tokens go",
            f"At {goals[0]:.0e} training FLOPs, or where the name says, without dropping, by noise level (0 is data, 1 "
            "is noise), mean over the seeds. The correlation is that of the router's probability with the local detail "
            "of the clean image.",
            _seed_table(routed),
            routing_table(routed),
            *_slope_parts(routed),
            *_ink_parts(routed),
        ]
        _plot_routing(routed, out / f"{data}-routing.png")
        parts.append(f"![kept fraction by noise level]({data}-routing.png)")
        masks = {way_of(run): line["masks"] for run, line in routed.items() if run.endswith("-0")}
        _draw_masks(masks, out / f"{data}-masks.png")
        levels = ", ".join(next(iter(masks.values())))
        parts += [
            f"What the routers keep (white) of four held-out images at noise levels {levels}:",
            f"![kept tokens]({data}-masks.png)",
            "## Budgets",
            "The same weights with tokens dropped:",
            _budget_table(routed),
        ]
    drawn = {run: line for run, line in shown.items() if run in runs and run.endswith("-0")}
    sheets = {run: line["samples"] for run, line in drawn.items() if line.get("samples")}
    if sheets:
        pixels = [_pixels(sheet) for sheet in sheets.values()]
        names = [way_of(run) for run in sheets]
        sheet = grid(np.concatenate(pixels), len(pixels[0]), row_names=names)
        sheet.quantize(COLORS_OF_SHEET).save(out / f"{data}-samples.png", optimize=True)
        parts += [
            "## Samples",
            f"At {goals[0]:.0e} training FLOPs, from the same noise, 30 Euler steps, no guidance, shown in "
            f"{COLORS_OF_SHEET} colours:",
            f"![samples]({data}-samples.png)",
        ]
    return parts


def _band_parts(reached: Results) -> list[str]:
    """The loss split by spatial frequency, where it was measured."""
    known = {run: line for run, line in reached.items() if "loss_by_band" in line}
    if not known:
        return []
    tables = []
    for level in next(iter(known.values()))["loss_by_band"]:
        rows = []
        for way, runs in by_way(known).items():
            means = np.mean([run["loss_by_band"][level] for run in runs], axis=0)
            rows.append([way, str(len(runs)), *(f"{loss:.4f}" for loss in means)])
        tables.append(markdown_table([f"noise level {level}", "seeds", *BANDS], rows))
    return [
        "The loss without dropping, split by spatial frequency in cycles per image (0 is the mean of the image); a row "
        "adds up to the loss at its noise level.",
        *tables,
    ]


def _curve_parts(main: Runs, data: str, goals: Sequence[float], out: Path) -> list[str]:
    """The section that compares the models while they train."""
    curves, since = curves_by_way(main), settled(main)
    decay, images = (next(iter(main.values()))[-1][key] for key in ("ema_decay", "eval_images"))
    _plot_curves(main, curves, since, goals, out / f"{data}-loss.png")
    return [
        "## Equal training FLOPs",
        f"Loss while training ({images} held-out images), mean over the seeds that came so far, and how far each "
        "DC-DiT is from each static model in the seeds that both have: below zero it is ahead. The averaged weights "
        f"keep {1 - decay:.1%} less of the start with each step: below {since:.1e} FLOPs "
        f"({FORGOTTEN / (1 - decay):.0f} steps) the curves show little else.",
        _curve_table(curves, since),
        *(f"- {sentence}" for sentence in _crossings(curves)),
        f"![loss over training FLOPs, and by noise level]({data}-loss.png)",
    ]


def at_goal(runs: Runs, goal: float) -> dict[str, dict[str, Any]]:
    """Run -> its line at a goal, of the runs that reached it."""
    lines = {run: [line for line in of_run if line["goal"] == goal] for run, of_run in runs.items()}
    return {run: of_run[-1] for run, of_run in lines.items() if of_run and of_run[-1]["training_flops"] >= goal}


def at_first_goal(runs: Runs, goal: float) -> dict[str, dict[str, Any]]:
    """Run -> its line at the first goal. What stopped before or went on is also there, with its FLOPs in the name."""
    reached = at_goal(runs, goal)
    others = {}
    for run, lines in runs.items():
        if run not in reached or lines[-1] is not reached[run]:
            way, _, seed = run.rpartition("-")
            others[f"{way} to {lines[-1]['training_flops']:.1e}-{seed}"] = lines[-1]
    return reached | others


def curves_by_way(runs: Runs) -> dict[str, dict[str, Curve]]:
    """Way -> seed -> its curve."""
    curves: dict[str, dict[str, Curve]] = {}
    for run, lines in runs.items():
        curves.setdefault(way_of(run), {})[run.rpartition("-")[2]] = curve_of(lines)
    return curves


def curve_of(lines: Sequence[Mapping[str, Any]]) -> Curve:
    """FLOPs and losses of a run, from its longest line."""
    flops, losses = np.array(lines[-1]["course"], dtype=float).reshape(-1, 2).T
    return flops, losses


def loss_at(curve: Curve, flops: float) -> float | None:
    """The loss at so many FLOPs, between two records; None where the run did not come that far."""
    spent, loss = curve
    if not len(spent) or not spent[0] <= flops <= spent[-1]:
        return None
    return float(np.interp(np.log(flops), np.log(spent), loss))


def losses_at(curves: Curves, flops: float) -> dict[str, float]:
    """Seed -> its loss, of the seeds that came that far."""
    losses = {seed: loss_at(curve, flops) for seed, curve in curves.items()}
    return {seed: loss for seed, loss in losses.items() if loss is not None}


def lead(ours: Curves, theirs: Curves, flops: float) -> float | None:
    """How far our mean loss is from theirs, over the seeds that both have at so many FLOPs: below zero it is lower."""
    mine, other = losses_at(ours, flops), losses_at(theirs, flops)
    both = mine.keys() & other.keys()
    return sum(mine[seed] for seed in both) / sum(other[seed] for seed in both) - 1 if both else None


def crossings(ours: Curves, theirs: Curves) -> list[float] | None:
    """FLOPs at which the order of two models changes, on the grid of our records. None if none can be compared."""
    leads = [(float(flops), lead(ours, theirs, flops)) for flops in next(iter(ours.values()))[0]]
    signs = [(flops, ahead < 0) for flops, ahead in leads if ahead is not None]
    return [after[0] for before, after in pairwise(signs) if before[1] != after[1]] if signs else None


def settled(runs: Runs) -> float:
    """FLOPs from which on the averaged weights of the slowest run have forgotten the start."""
    lines = [of_run[-1] for of_run in runs.values()]
    return max(FORGOTTEN / (1 - line["ema_decay"]) * line["training_flops"] / line["steps"] for line in lines)


def _curve_table(curves: Mapping[str, Curves], since: float) -> str:
    ways = [way for way in COLORS if way in curves]
    pairs = [(ours, way) for ours in DYNAMIC for way in STATIC if ours in curves and way in curves]
    head = ["training FLOPs", *ways, *(f"{ours} against {way}" for ours, way in pairs)]
    rows = []
    for mark in (mark for mark in MARKS if mark >= since / 5):
        losses = {way: list(losses_at(curves[way], mark).values()) for way in ways}
        if any(losses.values()):
            leads = [lead(curves[ours], curves[way], mark) for ours, way in pairs]
            cells = [_mean_cell(losses[way], len(curves[way])) for way in ways]
            rows.append([f"{mark:.1e}", *cells, *("" if ahead is None else f"{ahead:+.1%}" for ahead in leads)])
    return markdown_table(head, rows)


def _mean_cell(losses: Sequence[float], seeds: int) -> str:
    if not losses:
        return ""
    return _number(float(np.mean(losses))) + ("" if len(losses) == seeds else f" ({len(losses)} of {seeds} seeds)")


def _stopped_table(stopped: Results, runs: Runs) -> str:
    """What a stopped run had while training, beside the others with its seed at as many FLOPs."""
    others = list(dict.fromkeys(way_of(run) for run in runs))
    rows = []
    for run in stopped:
        flops, seed = float(curve_of(runs[run])[0][-1]), run.rpartition("-")[2]
        curves = [curve_of(runs.get(f"{way}-{seed}", [{"course": []}])) for way in others]
        rows.append([run, f"{flops:.2e}", *(_number(loss_at(curve, flops)) for curve in curves)])
    return markdown_table(["run", "FLOPs at its last record", *others], rows)


def _seed_table(routed: Results) -> str:
    rows = []
    for run, line in routed.items():
        if way_of(run) == OURS or way_of(run).startswith(f"{OURS} to"):
            rows.append([f"{run}, kept", *(f"{share:.1%}" for share in line["routing"]["kept_share"])])
    return markdown_table(["each seed", *(f"{level:g}" for level in cifar10.NOISE_LEVELS)], rows)


def _slope_parts(routed: Results) -> list[str]:
    """How much more each way keeps near the data than near the noise, for each of its seeds."""
    levels = cifar10.NOISE_LEVELS
    rows = []
    for way, runs in by_way(routed).items():
        shares = [run["routing"]["kept_share"] for run in runs]
        slopes = [100 * (share[0] - share[-1]) for share in shares]
        rows.append([way, f"{np.mean(slopes):+.1f}", ", ".join(f"{slope:+.1f}" for slope in slopes)])
    table = markdown_table(["points of the positions", "mean", "each seed"], rows)
    return [
        f"Timestep-adaptive shares: what is kept at level {levels[0]:g} less what is kept at {levels[-1]:g}.",
        table,
    ]


def _number(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _crossings(curves: Mapping[str, Curves]) -> list[str]:
    found = []
    for ours, way in product(DYNAMIC, STATIC):
        at = crossings(curves[ours], curves[way]) if ours in curves and way in curves else None
        if at is not None:
            places = f"change their order at {', '.join(f'{flops:.1e}' for flops in at)} FLOPs" if at else "never cross"
            found.append(f"The curves of {ours} and {way} {places}.")
    return found


def _cost_table(reached: Results) -> str:
    rows = []
    for way, runs in by_way(reached).items():
        parameters, images = runs[0]["parameters"], np.mean([run["images"] for run in runs])
        rows.append([way, str(len(runs)), f"{parameters:,}", f"{images:,.0f}", f"{first(runs[0]['gflops']):.3f}"])
    return markdown_table(["", "seeds", "parameters", "images seen", "GFLOPs/forward"], rows)


def _ink_parts(routed: Results) -> list[str]:
    rows = []
    for way, runs in by_way(routed).items():
        for name, key in (("ink", "kept_share_inside"), ("background", "kept_share_outside")):
            shares = np.array([run["routing"][key] for run in runs])
            if shares.size:
                rows.append([f"{way}, {name}", *(f"{share:.1%}" for share in shares.mean(0))])
    if not rows:
        return []
    table = markdown_table(["kept of the", *(f"{level:g}" for level in cifar10.NOISE_LEVELS)], rows)
    return ["Against the truth: the kept fraction of the ink and that of the empty background.", table]


def _budget_table(routed: Results) -> str:
    drops = list(next(iter(routed.values()))["loss"])
    rows = [
        [run, *(f"{line['loss'][rho]:.4f} at {line['gflops'][rho]:.2f} GFLOPs" for rho in drops)]
        for run, line in routed.items()
    ]
    return markdown_table(["run", *(f"drop {rho}" for rho in drops)], rows)


def _plot_curves(runs: Runs, curves: Mapping[str, Curves], since: float, goals: Sequence[float], path: Path) -> None:
    figure, (left, middle, right) = new_figure(1, 3, figsize=(17, 4))
    furthest = max(flops[-1] for of_way in curves.values() for flops, _ in of_way.values())
    for axis, least in ((left, 0.0), (middle, since if furthest > 1.2 * since else 0.0)):
        for way, of_way in curves.items():
            for number, (flops, losses) in enumerate(of_way.values()):
                late = flops >= least
                look: dict[str, Any] = {"color": COLORS[way], "lw": 1, "label": None if number else way}
                axis.plot(flops[late], losses[late], **look)
        axis.set(xlabel="training FLOPs", ylabel="held-out loss", xscale="log")
        axis.xaxis.set_minor_formatter("")
        marks = [mark for mark in (2e13, 5e13, 1e14, 1.5e14, 2e14, 3e14, 5e14, 1e15) if mark >= least]
        low, high = axis.get_xlim()
        axis.set_xticks(marks, [f"{mark:.1e}".replace("e+", "e") for mark in marks])
        axis.tick_params(axis="x", labelsize=7)
        axis.set_xlim(low, high)
    left.set_yscale("log")
    plain_ticks(left)
    left.legend(fontsize=8)
    for goal, style in zip(goals, ("--", "-", ":"), strict=False):
        means = {
            way: np.mean([first(run["loss_by_level"]) for run in of_way], axis=0)
            for way, of_way in by_way(at_goal(runs, goal)).items()
        }
        for (ours, marker), way in product(zip(DYNAMIC, "ox", strict=True), STATIC):
            if ours in means and way in means:
                share, label = 100 * (means[ours] / means[way] - 1), f"{ours} against {way}, {goal:.0e}"
                right.plot(cifar10.NOISE_LEVELS, share, style, marker=marker, ms=4, color=COLORS[way], label=label)
    right.axhline(0, color="black", lw=0.5)
    right.set(xlabel="noise level", ylabel="loss against the static model, %")
    if right.lines[1:]:
        right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path)


def _plot_variants(reached: Results, path: Path) -> None:
    """The loss of each way against that of the mean DC-DiT, by noise level; what is far off is left out."""
    means = {
        way: np.mean([first(run["loss_by_level"]) for run in runs], axis=0) for way, runs in by_way(reached).items()
    }
    shares = {way: 100 * (losses / means[OURS] - 1) for way, losses in means.items()}
    near = [way for way, share in shares.items() if (abs(share) < FAR).any()]
    figure, axis = new_figure(figsize=(11, 4.5))
    for number, way in enumerate(near):
        axis.plot(cifar10.NOISE_LEVELS, shares[way], label=way, **_look(number))
    axis.set(xlabel="noise level", ylabel=f"loss against {OURS}, %")
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, -FAR), min(high, FAR))
    _legend_beside(axis, len(near))
    figure.savefig(path)


def _look(number: int) -> dict[str, Any]:
    """The line of a way: ten colours, then the same with other dashes."""
    return {"marker": "o", "ms": 3, "lw": 1, "color": f"C{number % 10}", "ls": ("-", "--", ":")[number // 10 % 3]}


def _legend_beside(axis: Any, entries: int) -> None:
    if entries:
        columns = math.ceil(entries / LEGEND_ROWS)
        axis.legend(fontsize=7, ncols=columns, loc="center left", bbox_to_anchor=(1, 0.5))


def _plot_routing(routed: Results, path: Path) -> None:
    """What the routers keep by noise level, and where. A choice that keeps the same at every level is left out."""
    known = any(run["routing"]["kept_share_inside"] for run in routed.values())
    chosen = {way: [run["routing"] for run in runs] for way, runs in by_way(routed).items()}
    learned = {way: studies for way, studies in chosen.items() if any(np.ptp(s["kept_share"]) for s in studies)}
    figure, axes = new_figure(1, 3 if known else 2, figsize=(17 if known else 13, 4))
    for number, (way, studies) in enumerate(learned.items()):
        for axis, key in zip(axes, ("kept_share", "detail_correlation", "kept_share_inside"), strict=False):
            mean = np.mean([study[key] for study in studies], axis=0)
            axis.plot(cifar10.NOISE_LEVELS, mean, label=way, **_look(number))
    axes[0].set(xlabel="noise level", ylabel="kept fraction")
    _legend_beside(axes[-1], len(learned))
    axes[1].set(xlabel="noise level", ylabel="correlation with local detail")
    axes[1].axhline(0, color="black", lw=0.5)
    if known:
        axes[2].set(xlabel="noise level", ylabel="kept fraction of the ink", ylim=(-0.02, 1.02))
    figure.savefig(path)


def _pixels(samples: str) -> Any:
    """uint8 (SHOWN_SAMPLES, H, W, 3) of what a line holds."""
    flat = np.frombuffer(base64.b64decode(samples), np.uint8)
    side = math.isqrt(flat.size // (3 * SHOWN_SAMPLES))
    return flat.reshape(SHOWN_SAMPLES, side, side, 3)


def _draw_masks(masks: Mapping[str, Mapping[str, Sequence[str]]], path: Path) -> None:
    """A row for each way: the masks of the first images at one noise level after the other."""
    rows = [[bits for of_level in levels.values() for bits in of_level] for levels in masks.values()]
    pixels = np.array([[[int(bit) for bit in bits] for bits in row] for row in rows], dtype=np.uint8)
    side = math.isqrt(pixels.shape[-1])
    sheet = 255 * np.repeat(pixels.reshape(-1, side, side, 1), 3, axis=3)
    grid(sheet, len(rows[0]), row_names=list(masks)).save(path)


def _numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """What study.json keeps of a line: all but the pictures and what was kept at each step."""
    course = [(round(flops), round(loss, 5)) for flops, loss in line["course"]]
    kept = {name: value for name, value in line.items() if name not in ("samples", "masks", "kept")}
    return {**kept, "course": course}
