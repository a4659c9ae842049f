"""``dcdit evaluate``."""

import argparse
from pathlib import Path

import torch
from torch import nn

from dcdit.checkpoint import load_model, read_metadata
from dcdit.cli.sample import DEFAULT_METHOD
from dcdit.cli.sampling_options import add_sampling_options
from dcdit.data.autoencoder import create_decoder
from dcdit.evaluate.extractors import RESIZES, load_extractor
from dcdit.evaluate.features import extract
from dcdit.evaluate.generate import SAMPLES, Settings, Work, generate, weights_hash
from dcdit.evaluate.images import ImageSet, npz_arrays, open_images
from dcdit.evaluate.measure import Evaluation, evaluate_images
from dcdit.evaluate.report import write_report
from dcdit.sample.plan import check_budget, make_plans

TAKEN_OVER = (
    *("checkpoint", "num", "steps", "null_drop_fraction", "budget", "cfg_scale", "cfg_interval", "seed"),
    *("batch_size", "precision", "vae"),
)
"""Options that are settings of the sampling as they stand."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is evaluated").add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", metavar="PATH", help="draw images from it: run or checkpoint folder, or file")
    what.add_argument("--images", metavar="PATH", help="images: a folder, or .npz with arr_0 (ADM) or images")
    add = parser.add_argument_group("against what").add_argument
    add("--extractor", metavar="FILE", help="TorchScript Inception (.pt), or weights for torch-fidelity (.pth)")
    add("--reference", metavar="PATH", help="real images as above, or .npz with mu and sigma, or with both")
    add("--num-reference", type=int, metavar="N", help="compare with N of the reference's images (default: all)")
    add(
        "--size",
        type=int,
        metavar="N",
        help="crop images in folders to N x N pixels as ADM does (default: as they are)",
    )
    add(
        "--resize",
        choices=tuple(RESIZES),
        default="adm",
        help="to Inception's input: bilinear as ADM and DiT (default), or clean: antialiased bicubic",
    )
    add("--cache", default="out/features", metavar="DIR", help="where features are kept (default out/features)")
    add("--write-statistics", metavar="FILE", help="also write mu and sigma of the evaluated images to this .npz")
    add = parser.add_argument_group("sampling, with --checkpoint").add_argument
    add("--num", type=int, default=50_000, metavar="N", help="images to draw (default 50000)")
    add_sampling_options(add, budgets=1)
    add = parser.add_argument_group("in general").add_argument
    add("--seed", type=int, default=0, help="of the noise, and of what is drawn at random after (default 0)")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto takes a GPU if there is one (default auto)")
    add("--out", default="out/evaluate", metavar="DIR", help="where everything goes (default out/evaluate)")
    # What `dcdit sample` can do besides: its checks and plans read these.
    parser.set_defaults(target_flops=None, target_latency=None, profile=None, report=False)


def run(args: argparse.Namespace) -> None:
    _check(args)
    out = Path(args.out)
    extractor = None if args.extractor is None else load_extractor(args.extractor, args.resize)
    sampling = None
    if args.checkpoint is not None:
        sampling = _sample(args, out)
        if sampling is None:
            return
    images = open_images(out / SAMPLES if sampling else args.images, args.size)
    evaluation = None
    if extractor is not None:
        device = "cuda" if args.device == "auto" and torch.cuda.is_available() else "cpu"
        evaluation = _evaluate(args, images, extractor.to(device))
    print(write_report(out, images, args.reference, evaluation, sampling))
    print(f"\n{out / 'report.md'}")


def _sample(args: argparse.Namespace, out: Path) -> tuple[Settings, Work] | None:
    """Draw the images; None on processes that have nothing more to do."""
    from accelerate import PartialState

    state = PartialState(cpu=args.device == "cpu")
    model = load_model(args.checkpoint, ema=not args.no_ema).to(state.device)
    if args.precision == "bf16":
        model = model.bfloat16()
    notes = read_metadata(args.checkpoint, not args.no_ema)
    decode = create_decoder(args.vae, model.config.in_channels, state.device, notes)
    if decode is None:
        raise ValueError(f"{args.checkpoint} makes latents of {model.config.in_channels} channels; --vae decodes them")
    check_budget(args, model)
    method = args.method or DEFAULT_METHOD[notes.get("objective", "dit")]
    (plan,) = make_plans(args, model, torch.empty(0), method, clip=False)
    settings = Settings(
        weights=weights_hash(args.checkpoint, not args.no_ema),
        method=method,
        drop=plan.name,
        **{name: getattr(args, name) for name in TAKEN_OVER},
    )
    shares = {"rank": state.process_index, "world": state.num_processes, "wait": state.wait_for_everyone}
    work = generate(model, settings, plan.drop, out, decode, device=state.device, **shares)
    if state.num_processes > 1:
        state.destroy_process_group()
    return None if work is None else (settings, work)


def _evaluate(args: argparse.Namespace, images: ImageSet, extractor: nn.Module) -> Evaluation:
    features = extract(images, extractor, cache=args.cache)
    if args.write_statistics is not None:
        features.statistics.save(args.write_statistics)
    return evaluate_images(
        features,
        args.reference,
        extractor,
        num_reference=args.num_reference,
        size=args.size,
        cache=args.cache,
        seed=args.seed,
    )


def _check(args: argparse.Namespace) -> None:
    """What can be known before hours of sampling."""
    for name in ("num", "steps", "batch_size", "size", "num_reference"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; accepted: at least 1")
    if args.extractor is None and (args.images or args.reference or args.write_statistics):
        raise ValueError("--images, --reference and --write-statistics need features; give an --extractor")
    if args.reference is not None:
        reference = Path(args.reference)
        if reference.suffix != ".npz" or "mu" not in npz_arrays(reference):
            open_images(reference, args.size)
