"""``dcdit sample --report``: what the router did while the images were drawn, as a page to read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dcdit.profiling.plots import plot_boundary_maps, plot_sampling
from dcdit.sample.drawing import Decoder, FirstImage
from dcdit.sample.output import CURVES, MAPS, REPORT
from dcdit.utils.files import write_text
from dcdit.utils.tables import markdown_table

COLUMNS = 6
"""Steps shown as boundary maps."""

Image = np.ndarray[Any, np.dtype[np.float32]]


def write_report(out: Path, facts: dict[str, Any], first_images: Sequence[FirstImage], decode: Decoder | None) -> Path:
    """Write report.md and its pictures.

    Args:
        out: the folder of the samples.
        facts: what samples.json holds.
        first_images: one for each run.
        decode: of the samples; without it the first latent channels are shown.

    Returns:
        The path of report.md.
    """
    runs = facts["runs"]
    plot_sampling(runs, out / CURVES)
    sections = []
    for run, first_image in zip(runs, first_images, strict=True):
        picture = MAPS.format(run["name"])
        plot_boundary_maps(_columns(first_image, decode), out / picture, "expected image")
        shown = [f"![samples]({Path(name).name})" for name in run["files"][:1] if name.endswith(".png")]
        sections.append("\n\n".join([f"## {run['name']}", *shown, f"![boundary maps]({picture})"]))
    write_text(out / REPORT, _page(facts, sections))
    return out / REPORT


def _columns(first_image: FirstImage, decode: Decoder | None) -> list[dict[str, Any]]:
    """Evenly spaced steps, with the first and the last, as :func:`plot_boundary_maps` takes them."""
    times = list(first_image.expected)
    chosen = np.linspace(0, len(times) - 1, min(COLUMNS, len(times))).round().astype(int)
    columns = []
    for t in (times[i] for i in chosen):
        image = _image(first_image.expected[t], decode)
        # A method with two calls per step reaches some times twice. The later call is at the step's own state.
        nearest = min(reversed(first_image.maps), key=lambda seen: abs(seen.t - t))
        prob, mask = nearest.prob.numpy(), nearest.mask.numpy()
        repeat = np.ones((image.shape[0] // prob.shape[0], image.shape[1] // prob.shape[1]))
        columns.append(
            {
                "title": f"time {t / 1000:.2f}",
                "image": image,
                "prob": np.kron(prob, repeat),
                "mask": np.kron(mask, repeat).astype(bool),
            }
        )
    return columns


def _image(x: Tensor, decode: Decoder | None) -> Image:
    """(H, W, 3) in [0, 1]."""
    if decode is not None:
        pixels = (decode(x[None])[0].float().clamp(-1, 1) + 1) / 2
    else:
        # Fewer than three latent channels repeat the last.
        channels = x[[min(i, x.shape[0] - 1) for i in range(3)]].float()
        low, high = channels.amin(), channels.amax()
        pixels = (channels - low) / (high - low).clamp(min=1e-6)
    return pixels.permute(1, 2, 0).cpu().numpy()


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
    guidance = f"guidance {facts['cfg_scale']:g}" if facts["cfg_scale"] != 1 else "no guidance"
    if facts["cfg_interval"] is not None:
        guidance += " at times {:g} to {:g}".format(*facts["cfg_interval"])
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
        f"{len(facts['labels'])} images of `{facts['checkpoint']}`: {facts['steps']} steps of {facts['method']}, "
        f"{guidance}, seed {facts['seed']}, {facts['precision']} on {facts['device']}.",
        *targets,
        *losses,
        markdown_table(head, rows),
        "FLOPs are counted: 2 per multiply-add, both branches of guidance, every model call of the run. Seconds are "
        "the sampler's, decoding not counted. Kept fractions are means over the model calls.",
        f"![kept fraction and FLOPs over the sampling]({CURVES})",
        "\n".join(["What the router keeps before dropping, at the first and the last model call:", "", *changes]),
        *sections,
        "The maps are of the first image. The expected image is the model's estimate of the clean data at that step.",
    ]
    return "\n\n".join(parts) + "\n"


def _percent(calls: list[dict[str, float]], name: str) -> str:
    values = [call[name] for call in calls if name in call]
    return f"{sum(values) / len(values):.1%}" if values else ""
