"""Does a DC-DiT beat static DiTs at equal training compute, and if it does not, why? Many small runs on one machine.

    python3 -m benchmarks.studies.cifar10_gpu data --package DIR --out cifar10.npz
    python3 -m benchmarks.studies.equal_compute train --data cifar10.npz --out FOLDER
    python3 -m benchmarks.studies.equal_compute page --lines FOLDER/lines.jsonl --out PAGE

`train` needs no network, and a GPU or `--scale cpu` (smaller models and batches). It trains the runs of :func:`plan`
side by side, each to a number of training FLOPs, on CIFAR-10 and on digits on empty canvases, where it is known which
positions hold detail; `--scale cpu --images photographs` takes crops of 64 x 64 pixels. A run that has ended is
measured, and its line is appended to lines.jsonl. When the minutes are over, what still runs is stopped and measured as
it is. The order is that of :func:`plan`: what a small budget loses is what matters least. `page` runs on a CPU. Some
runs replace parts of the model in their own process (`benchmarks/studies/selection.py`).
"""

import argparse
import base64
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.machine import cpu_name
from benchmarks.studies import cifar10
from benchmarks.studies.comparison import way_of
from benchmarks.studies.digit_canvases import held_out_ink, scans_of_scikit_learn, write_canvases
from benchmarks.studies.equal_compute_page import SHOWN_SAMPLES, read_lines, write_page
from benchmarks.studies.frequencies import loss_by_band
from benchmarks.studies.selection import Variant, installed
from benchmarks.studies.training import losses_by_flops, read_log, train_all
from dcdit import cli
from dcdit.checkpoint import Model, load_model
from dcdit.config import TrainConfig, load_config, parse_overrides
from dcdit.diffusion import create_objective, sample
from dcdit.models import DCDiT
from dcdit.train.losses import autocast
from dcdit.utils.images import to_pixels

BASE = Path(__file__).with_suffix(".yaml")
GPU_MODELS = {
    "dc-dit": ("DC-DiT-S", {**cifar10.COMMON, "hidden_size": 128, "depth": 8}),
    "static-flops": ("DiT-S/2", {**cifar10.COMMON, "hidden_size": 140, "depth": 9}),
    "static-parameters": ("DiT-S/2", {**cifar10.COMMON, "hidden_size": 132, "depth": 8}),
}
"""As many FLOPs per forward pass as the DC-DiT at a quarter of its tokens; as many parameters."""
SCALES: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "gpu": (GPU_MODELS, {}),
    "cpu": (
        cifar10.MODELS,
        {
            "optim.device": "cpu",
            "optim.precision": "fp32",
            "optim.batch_size": 16,
            "optim.warmup_steps": 50,
            "optim.ema_decay": 0.99,
            "router.drop_warmup_steps": 200,
            "run.log_every": 10,
            "run.eval_every": 50,
            "run.eval_images": 128,
        },
    ),
}
"""The models, and the keys in which the runs differ from BASE."""
LARGE = {"grid": [64, 64]}
PHOTOGRAPH_MODELS = {
    "dc-dit": ("DC-DiT-S", {**cifar10.MODELS["dc-dit"][1], **LARGE}),
    "static-flops": ("DiT-S/2", {**cifar10.COMMON, **LARGE, "hidden_size": 120, "depth": 6}),
    "static-parameters": ("DiT-S/2", {**cifar10.MODELS["static-parameters"][1], **LARGE}),
}
"""Attention costs more on larger images, of static DiTs in all that they compute, so that other sizes match."""
DATA: dict[str, Mapping[str, Any]] = {
    "cifar": {"data.flip": True},
    "digits": {"data.flip": False},
    "photographs": {
        "data.kind": "photographs",
        "data.size": 64,
        "data.held_out": 0.25,
        "optim.batch_size": 4,
        "router.group_size": 4,
    },
}
"""The keys in which the runs on these images differ from the others."""
IMAGES = 12_000
GOALS = (3e14, 1e15)
SEEDS = (0, 1)
SAMPLING_STEPS, SHOWN_MASKS = 30, 4
MASK_LEVELS, BAND_LEVELS = (0.2, 0.5, 0.8), (0.05, 0.5, 0.95)
SPARED = 45.0
"""Seconds before the end from which on nothing new is started: it would not come far."""
COMMAND = "python3 -m benchmarks.studies.equal_compute train --data cifar10.npz --out FOLDER"
NEEDED = (("train", "data"), ("train", "out"), ("page", "lines"), ("page", "out"))


class Way(NamedTuple):
    """One way to train."""

    model: str = "dc-dit"
    variant: Variant = Variant()
    start: str = "paper"
    settings: Mapping[str, Any] = {}
    context: bool = False
    """``cell_context`` of the model."""


MAIN = {name: Way(name) for name in GPU_MODELS}
CHOICES = {
    "dc-dit+clean": Way(variant=Variant(clean=True)),
    "static-flops+clean": Way("static-flops", Variant(clean=True)),
    "static-parameters+clean": Way("static-parameters", Variant(clean=True)),
    "uniform": Way(variant=Variant("regular")),
    "oracle": Way(variant=Variant("oracle")),
    "no-dropping": Way(settings={"router.drop_fractions": [0.0]}),
    "learned+cell": Way(variant=Variant(cell=True)),
    "random": Way(variant=Variant("random")),
    "official-start": Way(start="official"),
    "uniform+cell": Way(variant=Variant("regular", cell=True)),
    "uniform+ordered": Way(variant=Variant("uniform")),
    "uniform+smoothed": Way(variant=Variant("regular-smoothed")),
    "uniform+shifted": Way(variant=Variant("regular-shifted")),
    "learned+grid": Way(variant=Variant(rule="grid")),
    "one-per-cell": Way(variant=Variant(rule="one-per-cell")),
    "uniform+context": Way(variant=Variant("uniform"), context=True),
    "dithered": Way(variant=Variant("dithered")),
    "dithered+context": Way(variant=Variant("dithered"), context=True),
    "learned+context": Way(context=True),
    "uniform+context+image-norm": Way(variant=Variant("uniform", image_norm=True), context=True),
    "uniform+context+groups-of-8": Way(variant=Variant("uniform", groups=4), context=True),
    "uniform+patches": Way(variant=Variant("uniform", patches=True), context=True),
    "uniform+context+skip": Way(variant=Variant("uniform", input_skip=True), context=True),
    "uniform+context+offsets": Way(variant=Variant("uniform", offsets=True), context=True),
    "dithered-soft": Way(variant=Variant("dithered", rule="soft")),
    "dithered-soft+cell": Way(variant=Variant("dithered", cell=True, rule="soft")),
    "dithered-bounded": Way(variant=Variant("dithered", rule="bounded")),
    "dithered-positions": Way(variant=Variant(rule="dithered-positions")),
    "learned+detached": Way(variant=Variant(rule="detached")),
    "learned+grid+detached": Way(variant=Variant(rule="grid+detached")),
}
RATES = {
    f"{name}+lr{rate}": way._replace(settings={"optim.lr": float(rate)})
    for rate in ("2e-3", "5e-4", "4e-3")
    for name, way in {**MAIN, "dithered+context": CHOICES["dithered+context"]}.items()
}
EPSILON = {f"{name}+epsilon": Way(name, settings={"diffusion.objective": "dit"}) for name in MAIN}
SHARES = {
    "groups-of-one": Way(settings={"router.group_size": 1}),
    "ratio-weight-x10": Way(settings={"router.loss_weight": 0.3}),
    "target-from-1.5": Way(settings={"router.target_start": 1.5, "router.target_warmup_steps": 400}),
    "target-from-16": Way(settings={"router.target_start": 16.0, "router.target_warmup_steps": 400}),
    "logit-normal": Way(variant=Variant(time="logit_normal")),
}
"""What might decide how many tokens the router keeps at which noise level."""
WAYS = {**MAIN, **CHOICES, **RATES, **EPSILON, **SHARES}


def plan(goals: Sequence[float], images: Sequence[str]) -> list[tuple[str, float]]:
    """Runs ("<data>-<way>-<seed>") and the FLOPs to which they are trained, the most important first."""
    first, last = goals[0], goals[-1]
    parts = (
        (MAIN, SEEDS, first),
        (CHOICES, SEEDS[:1], first),
        (MAIN, SEEDS, last),
        (RATES | EPSILON, SEEDS, first),
        (SHARES, SEEDS, first),
        (CHOICES, SEEDS[1:], first),
        (CHOICES, SEEDS[:1], last),
    )
    runs = [(f"{data}-{way}-{seed}", flops) for ways, seeds, flops in parts
            for seed in seeds for way in ways for data in images]  # fmt: skip
    return list(dict.fromkeys(runs))


def way_in(run: str) -> Way:
    """The way of a run: ``"cifar-no-dropping-0"`` -> that of ``"no-dropping"``."""
    return WAYS[way_of(run).partition("-")[2]]


def config_of(
    run: str, flops: float, scale: str, sources: Mapping[str, Path], runs: Path, settings: Mapping[str, Any]
) -> TrainConfig:
    """The configuration of one run."""
    data, way = run.partition("-")[0], way_in(run)
    models, changed = SCALES[scale]
    if data == "photographs":
        models = PHOTOGRAPH_MODELS
    preset, overrides = models[way.model]
    dynamic: dict[str, Any] = {}
    if way.model == "dc-dit":
        dynamic = {"start": way.start, "router": way.variant.router, "cell_context": way.context}
    values = {
        "model.name": preset,
        "model.num_classes": 10,
        "model.overrides": {**overrides, **dynamic},
        "run.out": str(runs / run),
        "optim.flops": flops,
        "optim.seed": int(run.rpartition("-")[2]),
        **changed,
        **DATA[data],
        **({"data.path": str(sources[data])} if data in sources else {}),
        **way.settings,
        **settings,
    }
    if way.variant.replaces_parts:  # with code that no CUDA graph can hold
        values["optim.graph"] = False
    with installed(way.variant):
        return load_config(BASE, values)


def train_and_measure(
    run: str, folder: Path, until: float, lines: Path, held_out: int, arguments: Sequence[str]
) -> int:
    """One process of ``train``: train as ``dcdit train`` does, not past ``until``, then append a line to ``lines``."""
    variant = way_in(run).variant
    with installed(variant):
        minutes = max((until - time.time()) / 60, 1e-3)
        code = cli.main(["train", *arguments, "--set", f"run.minutes={minutes}"])
        if not code:
            found = measure(load_config(folder / "config.yaml"), variant.clean, held_out)
            write_line(lines, {"run": run, **found})
    return code


@torch.inference_mode()
def measure(config: TrainConfig, clean: bool, held_out: int) -> dict[str, Any]:
    """What the page shows of a run, measured with its averaged weights in the precision and where it was trained.

    Args:
        config: of the run.
        clean: whether the model predicts the clean image.
        held_out: number of images.
    """
    device = torch.device("cuda" if config.optim.device == "auto" and torch.cuda.is_available() else "cpu")
    model = load_model(config.run.out).to(device)
    ink = None
    if Path(config.data.path or "").stem == "digits":
        ink = held_out_ink(Path(config.data.path or ""), held_out, config.data.held_out)
    facts = cifar10.run_facts(config)
    log = read_log(config)
    found = {name: facts[name] for name in ("steps", "images", "training_flops")}
    found["goal"] = config.optim.flops
    found["ema_decay"], found["eval_images"] = config.optim.ema_decay, config.run.eval_images
    found["machine"] = (
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else cpu_name()}, torch {torch.__version__}"
    )
    found["course"] = losses_by_flops(log)
    found["kept"] = [(record["flops"], round(record["natural"], 4)) for record in log if "natural" in record]
    with autocast(config.optim, device):
        found |= cifar10.measure_losses(config, model, held_out, ink)
        del found["seconds"]  # other runs had the GPU as well
        if config.diffusion.objective == "flow" and not clean:
            found["loss_by_band"] = loss_by_band(config, model, held_out, BAND_LEVELS)
        if isinstance(model, DCDiT):
            found["masks"] = masks(config, model, device)
        found["samples"] = draw(config, model, clean, device)
    return found


def masks(config: TrainConfig, model: DCDiT, device: torch.device) -> dict[str, list[str]]:
    """Noise level -> what the router keeps of the first held-out images, a 0 or 1 for each position."""
    objective = create_objective(config.diffusion.objective, model.config.learn_sigma)
    x0, y = (tensor.to(device) for tensor in cifar10.held_out(config, SHOWN_MASKS))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(device)
    found = {}
    for level in MASK_LEVELS:
        noisy = objective.noise(x0, objective.t_at(level, x0), noise)
        _, routing = model(noisy.x, noisy.time, y, return_routing=True)
        found[str(level)] = ["".join(map(str, kept)) for kept in routing.natural_mask.int().tolist()]
    return found


def draw(config: TrainConfig, model: Model, clean: bool, device: torch.device) -> str | None:
    """Euler samples without guidance, all models from the same noise: uint8 (SHOWN_SAMPLES, H, W, 3) in base64.

    None of a model that this sampler does not fit, and none where the clean image, which samples lack, chooses tokens.
    """
    if config.diffusion.objective != "flow" or config.model.overrides.get("router") == "oracle":
        return None

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = model(x, t, y)
        return (x - out) / (t / 1000).view(-1, 1, 1, 1) if clean else out

    labels, shape = torch.arange(SHOWN_SAMPLES, device=device) % 10, (3, *model.config.grid)
    null_class = model.config.num_classes
    drawn = sample(
        velocity, labels, SAMPLING_STEPS, "euler", shape=shape, null_class=null_class, progress=False, graph=False
    )
    return base64.b64encode(to_pixels(drawn).tobytes()).decode()


def write_line(lines: Path, values: Mapping[str, Any]) -> None:
    """Append one line in one write, so that the lines of other processes stay whole."""
    with lines.open("ab", buffering=0) as file:
        file.write((json.dumps(values) + "\n").encode())


def train_runs(args: argparse.Namespace) -> None:
    """All of ``train``: the data, the processes, the lines."""
    until = time.time() + 60 * args.minutes
    args.runs.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    lines, sources = args.out / "lines.jsonl", {"cifar": args.data, "digits": args.runs / "digits.npz"}
    held_out = load_config(BASE).data.held_out
    if not sources["digits"].is_file():
        write_canvases(args.digits or scans_of_scikit_learn(), sources["digits"], IMAGES, held_out)
    settings = parse_overrides(args.set)
    me = ("-m", "benchmarks.studies.equal_compute")
    configs, programs = {}, {}
    for run, flops in plan(args.goals, args.images):
        if way_of(run).partition("-")[2] not in args.only or int(run.rpartition("-")[2]) not in args.seeds:
            continue
        config = config_of(run, flops, args.scale, sources, args.runs, settings)
        configs[f"{run} to {flops:g}"] = config
        programs[f"{run} to {flops:g}"] = (*me, "run", run, config.run.out, str(until), str(lines), str(args.held_out))
    train_all(configs, args.jobs, programs, until - SPARED)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["run"]:
        run, folder, until, lines, held_out = arguments[1:6]
        return train_and_measure(run, Path(folder), float(until), Path(lines), int(held_out), arguments[6:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("train", "page"))
    parser.add_argument("--data", type=Path, help="train: the file that `cifar10_gpu data` wrote")
    parser.add_argument("--digits", type=Path, help="train: digits.csv.gz of scikit-learn, where that is not installed")
    parser.add_argument("--runs", type=Path, default=Path("out/equal-compute"), help="train: folder of the runs")
    parser.add_argument("--out", type=Path, help="train: folder of lines.jsonl; page: of the page")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which all is stopped (%(default)s)")
    parser.add_argument("--scale", choices=SCALES, default="gpu", help="train: size of models (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=12, help="runs at a time (default: %(default)s)")
    parser.add_argument(
        "--goals", type=float, nargs="+", default=GOALS, help="train: FLOPs, first and last (3e14 1e15)"
    )
    parser.add_argument(
        "--images", nargs="+", choices=DATA, default=("cifar", "digits"), help="train: on these; default: cifar digits"
    )
    parser.add_argument("--only", nargs="+", choices=WAYS, default=[*WAYS], help="train: these ways; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=SEEDS, help="train: these; default: 0 1")
    parser.add_argument("--held-out", type=int, default=cifar10.HELD_OUT, help="train: images to measure (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="train: of every run")
    parser.add_argument("--lines", type=Path, nargs="+", help="page: what `train` wrote")
    parser.add_argument("--command", default=COMMAND, help="page: how `train` was called, to be told there")
    args = parser.parse_args(arguments)
    for verb, option in NEEDED:
        if args.verb == verb and getattr(args, option) is None:
            parser.error(f"{verb} needs --{option}")
    if args.scale != "cpu" and "photographs" in args.images:
        parser.error("--images photographs needs --scale cpu: no sizes of models for a GPU are matched to them")
    if args.verb == "train":
        train_runs(args)
    else:
        print(f"wrote {write_page(read_lines(args.lines), args.command, args.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
