"""``dcdit demo``: the whole path on a CPU in minutes.

It trains a small DC-DiT on scanned digits or photographs, samples it at three budgets, shows which tokens the router
keeps, and times the model against the static DiT with the same transformer.
"""

import argparse
import importlib
import json
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dcdit.cli.options import check_number, seed
from dcdit.config import RECIPES, TrainConfig, load_config
from dcdit.diffusion import Objective, create_objective
from dcdit.models import DCDiT
from dcdit.nn.memory_format import channels_last
from dcdit.utils.files import write_text
from dcdit.utils.outputs import check_output_folder, check_own
from dcdit.utils.signals import Stopped

if TYPE_CHECKING:
    from dcdit.sample.options import SamplingOptions

DROP_FRACTIONS = (0.0, 0.3, 0.6)
NOISE_LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
STUDY_IMAGES = 48
TIMED_IMAGES = 16
SAMPLES_PER_CLASS = 4
SAMPLING_STEPS = 40
GUIDANCE = 2.0
ANIMATED = 0.3
"""Drop fraction of the run that the animation shows."""
RECORD, REPORT, PAGE, SAMPLES = "demo.json", "report.md", "steps.html", "samples-drop-{:g}.png"
PICTURES = ("steps.webp", "training.png", "boundary_maps.png", "profile.png")
FILES = (REPORT, PAGE, *PICTURES, *map(SAMPLES.format, DROP_FRACTIONS))
"""Files beside the record, which is written before them."""


@dataclass(frozen=True)
class Data:
    """What the demo says about images that it trains on. The recipe has their name with ``-cpu`` at its end."""

    package: str
    """The module whose files they are."""
    images: str
    """What they are called."""
    about: str
    """Where they come from, and one sentence about what they cannot show."""
    readable: int | None = None
    """Training steps after which most samples can be read; None where nobody counted them."""

    def too_few(self, steps: int, minutes: float) -> str:
        """What to do where a slow or busy machine left too few steps for samples that can be read; else nothing."""
        if self.readable is None or steps >= self.readable:
            return ""
        enough = math.ceil(minutes * self.readable / max(steps, 1))
        return (
            f"TOO SHORT: {steps} training steps are too few for samples that can be read, which takes about "
            f"{self.readable:,}. At the speed of this run that is `dcdit demo --minutes {enough}`."
        )


DATA = {
    "digits": Data(
        "sklearn",
        "scanned digits",
        "The images are scikit-learn's scans of handwritten digits, 8x8 pixels each, with a margin and enlarged. What\n"
        "is learned from 1,617 of them shows that the mechanism works, not how good it is.",
        readable=1_200,
    ),
    "photographs": Data(
        "skimage",
        "crops of photographs",
        "The images are crops of the photographs inside scikit-image, one class per photograph. A handful of\n"
        "photographs shows the mechanism; it says nothing about generalisation.",
    ),
}
"""``--data`` to what it means."""


def demo_config(data: str, out: Path, minutes: float, seed: int = 0) -> TrainConfig:
    """The recipe, but the time ends the run, and records are frequent enough for a curve."""
    overrides = {
        "run.out": str(out),
        "run.minutes": minutes,
        "run.log_every": 5,
        "run.eval_every": 0,
        "run.checkpoint_every": 1_000_000,
        "optim.steps": 1_000_000,
        "optim.seed": seed,
    }
    return load_config(RECIPES / f"{data}-cpu.yaml", overrides)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``dcdit demo``."""
    parser.add_argument(
        "--data", choices=DATA, default="digits", help="photographs need longer to show anything (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=4.0, help="training time, minutes (default: %(default)s)")
    parser.add_argument("--out", default="out/demo", help="folder of the report, new or of an earlier demo")
    parser.add_argument("--seed", type=seed, default=0, help="of weights, data order and samples")


def run(args: argparse.Namespace) -> int:
    """Entry point of ``dcdit demo``."""
    check_number("--minutes", args.minutes)
    report = demo(args.data, Path(args.out), args.minutes, args.seed)
    print(f"\nwrote {report}")
    return 0


def demo(data: str, out: Path, minutes: float, seed: int = 0) -> Path:
    """Run everything on one of :data:`DATA`; returns the path of report.md."""
    from dcdit.checkpoint import load_model
    from dcdit.data import create_dataset
    from dcdit.profiling.plots import plot_boundary_maps, plot_profile, plot_training
    from dcdit.profiling.profile import profile
    from dcdit.profiling.router_study import local_detail, study_router
    from dcdit.sample.options import SamplingOptions
    from dcdit.train import train

    for module in ("matplotlib", DATA[data].package):
        importlib.import_module(module)  # if one is missing, say so before the work
    began = time.monotonic()
    check_output_folder(out)
    check_own(out, RECORD, ("config",), FILES)
    run_folder = out / time.strftime("run-%Y%m%d-%H%M%S")
    config = demo_config(data, run_folder, minutes, seed)
    print(f"1/4 training for {minutes:g} minutes on {DATA[data].images}", flush=True)
    result = train(config)
    if result.signal:
        raise Stopped(result.signal)
    write_text(out / RECORD, json.dumps({"config": asdict(config)}))
    too_few = DATA[data].too_few(result.step, minutes)
    if too_few:
        print(too_few, flush=True)
    log = [json.loads(line) for line in result.log.read_text(encoding="utf-8").splitlines()]
    log = [row for row in log if "loss" in row]
    plot_training(log, config.router.target, out / "training.png")
    model = load_model(result.checkpoint).eval()
    assert isinstance(model, DCDiT)
    channels_last(model)

    print(f"2/4 sampling at drop fractions {', '.join(map(str, DROP_FRACTIONS))}", flush=True)
    held_out = create_dataset(config.data, "held_out")
    options = SamplingOptions(config.run.out, "euler", steps=SAMPLING_STEPS, cfg_scale=GUIDANCE, seed=seed)
    samples = _draw_samples(model, options, out, held_out.class_names)

    print(f"3/4 where the router looks, on held-out {DATA[data].images}", flush=True)
    x0, y = _stack([held_out[n] for n in range(STUDY_IMAGES)])
    objective = create_objective(config.diffusion.objective, model.config.learn_sigma)
    detail = local_detail(x0)
    study = study_router(model, x0, y, objective, NOISE_LEVELS, detailed=detail >= detail.quantile(2 / 3))
    plot_boundary_maps(_boundary_maps(model, x0[:1], y[:1], objective), out / "boundary_maps.png")

    print("4/4 timing against the static DiT", flush=True)
    x0, y = x0[:TIMED_IMAGES], y[:TIMED_IMAGES]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    noisy = objective.noise(x0, objective.t_at(0.5, x0), noise)
    timing = profile(model, "DC-DiT (demo)", noisy.x, noisy.time, y, DROP_FRACTIONS)
    plot_profile(timing, out / "profile.png")
    if timing.caution():
        print(timing.caution(), flush=True)

    facts = {
        "data": data,
        "config": asdict(config),
        "steps": result.step,
        "training_log": log,
        "samples": samples,
        "router": asdict(study),
        "profile": asdict(timing),
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint": str(result.checkpoint),
        "seconds": time.monotonic() - began,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "class_names": list(held_out.class_names),
    }
    write_text(out / RECORD, json.dumps(facts, indent=2) + "\n")
    timings = [timing.caution(), timing.conditions(), timing.table(), timing.stage_table()]
    write_text(out / REPORT, _report(facts, too_few, "\n\n".join(filter(None, timings))))
    return out / REPORT


def _draw_samples(model: DCDiT, options: "SamplingOptions", out: Path, class_names: Sequence[str]) -> dict[float, Any]:
    """Sheets at all budgets, the animation and steps.html; what each budget took, as samples.json says it."""
    from dcdit.data.autoencoder import create_decoder
    from dcdit.sample.animation import write_animation
    from dcdit.sample.drawing import draw
    from dcdit.sample.frames import frames
    from dcdit.sample.output import describe_run, write_images
    from dcdit.sample.page import write_page
    from dcdit.sample.plan import Plan

    classes = model.config.num_classes
    decode = create_decoder(None, model.config.in_channels, torch.device("cpu"), {})
    labels = torch.arange(classes).repeat(SAMPLES_PER_CLASS)
    runs, shown = {}, {}
    for rho in DROP_FRACTIONS:
        began = time.monotonic()
        drawn = draw(model, options, labels, rho, trace=classes)
        seconds = time.monotonic() - began
        stem = SAMPLES.format(rho).removesuffix(".png")
        files = write_images(
            out,
            stem,
            drawn.x,
            labels,
            decode,
            class_names=class_names,
            batch_size=options.batch_size,
            columns=classes,
        )
        plan = Plan(f"drop {rho:g}", rho, {"drop_fraction": rho})
        runs[rho] = {**describe_run(plan, drawn, seconds, files), "file": files[0].name, "images": len(labels)}
        shown[rho] = frames(drawn.traced, decode)
    write_animation(out / "steps.webp", shown[ANIMATED], class_names, f"drop {ANIMATED:g}")
    title = (
        f"The demo: {len(labels)} images, {options.steps} steps of {options.method}, guidance {options.cfg_scale:g}, "
        f"seed {options.seed}."
    )
    write_page(out / PAGE, {"runs": list(runs.values())}, list(shown.values()), class_names, title)
    return runs


def _stack(pairs: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in pairs]), torch.tensor([label for _, label in pairs])


@torch.inference_mode()
def _boundary_maps(model: DCDiT, x0: Tensor, y: Tensor, objective: Objective) -> list[dict[str, Any]]:
    """The first image at every noise level with its boundary probabilities and kept tokens, for a plot."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    maps = []
    for level in NOISE_LEVELS:
        noisy = objective.noise(x0, objective.t_at(level, x0), noise)
        _, routing = model(noisy.x, noisy.time, y, return_routing=True)
        maps.append(
            {
                "title": f"noise level {level:g}",
                "image": ((noisy.x[0].clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(),
                "prob": routing.prob.view(model.config.grid).numpy(),
                "mask": routing.mask.view(model.config.grid).numpy(),
            }
        )
    return maps


def _report(facts: dict[str, Any], too_few: str, timings: str) -> str:
    from dcdit.utils.tables import markdown_table

    study, log, data = facts["router"], facts["training_log"], DATA[facts["data"]]
    rows = [
        [f"{level:g}", f"{kept:.1%}", f"{detailed:.1%}", f"{others:.1%}", f"{correlation:+.2f}"]
        for level, kept, detailed, others, correlation in zip(
            study["levels"],
            study["kept_share"],
            study["kept_share_inside"],
            study["kept_share_outside"],
            study["detail_correlation"],
            strict=True,
        )
    ]
    router = markdown_table(
        ["noise level", "kept", "of the most detailed third", "of the others", "correlation with detail"], rows
    )
    grids = "\n\n".join(
        f"**drop fraction {s['drop_fraction']:g}** ({s['images']} images, {SAMPLING_STEPS} Euler steps, "
        f"guidance {GUIDANCE:g}, {s['seconds']:.0f} s)\n\n![samples]({s['file']})"
        for s in facts["samples"].values()
    )
    more, less = study["kept_share"][0], study["kept_share"][-1]
    detailed, others = study["kept_share_inside"][0], study["kept_share_outside"][0]
    optim, timed = facts["config"]["optim"], facts["profile"]
    target, size = facts["config"]["router"]["target"], facts["config"]["data"]["size"]
    caution = f"{too_few}\n\n" if too_few else ""
    return f"""# DC-DiT demo

{caution}A DC-DiT with {facts["parameters"]:,} parameters, trained from scratch for {facts["steps"]} steps of
{optim["batch_size"]} {data.images} ({size}x{size} pixels, one token per pixel; classes:
{", ".join(facts["class_names"])}). Everything took {facts["seconds"]:.0f} s
and at most {facts["peak_memory_gb"]:.1f} GB of memory.
{data.about}

## Training

Last logged: loss {log[-1]["loss"]:.3f}, {log[-1]["natural"]:.1%} of the tokens kept before dropping
(target 1/{target:g}).

![loss and compression](training.png)

## Samples at three budgets

The weights and the noise are the same at all three.

{grids}

What the model expects, what the router sees and what it keeps, step by step, at drop fraction {ANIMATED:g}
([{PAGE}]({PAGE}) has a slider over the steps and one over the budgets):

![image, probability and kept tokens over the steps](steps.webp)

## Where the router looks

{study["images"]} held-out images, no dropping. Detail is the log variance in a 5x5 window. The correlation is that of
detail and the router's probability over all positions, and the third is of all positions. Training asks for none of
this: a token is kept where that lowered the loss of this model, which need not be where a person sees detail.
At the lowest noise level, {detailed:.1%} of the most detailed third are kept and {others:.1%} of the others. The kept
fraction goes from {more:.1%} there to {less:.1%} at the highest level.

{router}

One held-out image at five noise levels:

![boundary maps](boundary_maps.png)

## Time against the static DiT

Same transformer, random weights for the static models, batch {timed["batch"]}, {timed["threads"]} thread(s),
{timed["dtype"]}, all models timed in one run.
eta = (time static / time dynamic) / (FLOPs static / FLOPs dynamic); 1 means that every saved FLOP became time.
At this size overheads weigh more than in the published models; `dcdit profile --model DC-DiT-S` times those.

The interval behind eta holds its true median with a probability of 95 %. The spread is half the interquartile range
over the median.

{timings}

![times faster than the static models, time and FLOPs by stage, eta](profile.png)
"""
