"""``dcdit sample --report``: what the router did while the images were drawn, as a page to read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dcdit.profiling.plots import plot_boundary_maps, plot_sampling
from dcdit.sample.animation import write_animation
from dcdit.sample.drawing import Decoder, TracedImage
from dcdit.sample.frames import Frame, frames
from dcdit.sample.output import ANIMATION, CURVES, MAPS, PAGE, REPORT, TRACED, label_names
from dcdit.sample.page import write_page
from dcdit.utils.files import write_text
from dcdit.utils.tables import markdown_table

COLUMNS = 6
"""Steps shown as boundary maps."""


def write_report(
    out: Path, facts: dict[str, Any], traced: Sequence[Sequence[TracedImage]], decode: Decoder | None
) -> Path:
    """Write report.md, its pictures, and report.html, which stands alone.

    Args:
        out: the folder of the samples.
        facts: what samples.json holds.
        traced: the first images of each run.
        decode: of the samples; without it the first latent channels are shown.

    Returns:
        The path of report.md.
    """
    runs = facts["runs"]
    plot_sampling(runs, out / CURVES)
    names = label_names(facts["labels"], facts["class_names"])[: len(traced[0])]
    shown = [frames(images, decode) for images in traced]
    sections = []
    for run, of_run in zip(runs, shown, strict=True):
        animation, maps = ANIMATION.format(run["name"]), MAPS.format(run["name"])
        write_animation(out / animation, of_run, names, run["name"].replace("_", " "))
        plot_boundary_maps(_columns(of_run), out / maps, "expected image")
        samples = [f"![samples]({Path(name).name})" for name in run["files"][:1] if name.endswith(".png")]
        pictures = [f"![the run, step by step]({animation})", f"![boundary maps]({maps})"]
        sections.append("\n\n".join([f"## {run['name']}", *samples, *pictures]))
    write_page(out / PAGE, facts, shown, names, _settings(facts))
    write_text(out / REPORT, _page(facts, sections))
    return out / REPORT


def _columns(shown: Sequence[Frame]) -> list[dict[str, Any]]:
    """The first image at evenly spaced steps, with the first and the last, as :func:`plot_boundary_maps` takes them."""
    chosen = np.linspace(0, len(shown) - 1, min(COLUMNS, len(shown))).round().astype(int)
    columns = []
    for frame in (shown[i] for i in chosen):
        image, prob, mask = frame.images[0] / 255, frame.prob[0], frame.mask[0]
        repeat = np.ones((image.shape[0] // prob.shape[0], image.shape[1] // prob.shape[1]))
        columns.append(
            {
                "title": f"time {frame.t / 1000:.2f}",
                "image": image,
                "prob": np.kron(prob, repeat),
                "mask": np.kron(mask, repeat).astype(bool),
            }
        )
    return columns


def _settings(facts: dict[str, Any]) -> str:
    """What all runs have in common, in a line."""
    guidance = f"guidance {facts['cfg_scale']:g}" if facts["cfg_scale"] != 1 else "no guidance"
    if facts["cfg_interval"] is not None:
        guidance += " at times {:g} to {:g}".format(*facts["cfg_interval"])
    return (
        f"{len(facts['labels'])} images of {facts['checkpoint']}: {facts['steps']} steps of {facts['method']}, "
        f"{guidance}, seed {facts['seed']}, {facts['precision']} on {facts['device']}."
    )


def _page(facts: dict[str, Any], sections: list[str]) -> str:
    runs = facts["runs"]
    guided = any("kept_null" in call for run in runs for call in run["calls"])
    head = ["run", "kept", *(["kept, unconditional"] if guided else []), "before dropping", "TFLOPs/image", "s/image"]
    rows = [
        [
            run["name"],
            f"{run['kept']:.1%}",
            *([_percent(run["calls"], "kept_null")] if guided else []),
            f"{run['natural']:.1%}",
            f"{run['tflops_per_image']:.4g}",
            f"{run['seconds_per_image']:.3g}",
        ]
        for run in runs
    ]
    changes = [
        f"- {run['name']}: {run['calls'][0]['natural']:.1%} at time {run['calls'][0]['t'] / 1000:.2f}, "
        f"{run['calls'][-1]['natural']:.1%} at time {run['calls'][-1]['t'] / 1000:.2f}"
        for run in runs
    ]
    targets = [
        f"The target was {choice['target']:g} {choice['unit']} per image. Expected of drop fraction "
        f"{run['drop_fraction']:.3f}: {choice['expected']:.4g}, from {choice['source']}."
        for run in runs
        if (choice := run.get("target"))
    ]
    losses = [
        f"{run['name']} lost {run['overflow']} tokens to its capacity ({facts['capacity']})."
        for run in runs
        if "overflow" in run
    ]
    parts = [
        "# What was kept while sampling",
        _settings(facts),
        f"[{PAGE}]({PAGE}) has the same with a slider over the steps and one over the budgets.",
        *targets,
        *losses,
        markdown_table(head, rows),
        "FLOPs are counted: 2 per multiply-add, both branches of guidance, every model call of the run. Seconds are "
        "the sampler's, decoding not counted. Kept fractions are means over the model calls.",
        f"![kept fraction and FLOPs over the sampling]({CURVES})",
        "\n".join(["What the router keeps before dropping, at the first and the last model call:", "", *changes]),
        *sections,
        f"The animations are of the first {TRACED} images at most, the maps of the first. The expected image is the "
        "model's estimate of the clean data at that step.",
    ]
    return "\n\n".join(parts) + "\n"


def _percent(calls: list[dict[str, float]], name: str) -> str:
    values = [call[name] for call in calls if name in call]
    return f"{sum(values) / len(values):.1%}" if values else ""
