"""``dcdit evaluate``: metrics of a checkpoint's samples, or of any images, against real images."""

import argparse
import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

import torch

from dcdit.checkpoint import model_file
from dcdit.cli.options import add_device_option, check_counts, seed
from dcdit.cli.sampling_options import add_sampling_options, check_fit, sampling_options
from dcdit.evaluate.extractors import RESIZES, load_extractor
from dcdit.evaluate.features import Statistics, extract_features
from dcdit.evaluate.generate import SAMPLES, SAMPLING, SampleSettings, SamplingCost, generate
from dcdit.evaluate.images import holds_images, npz_arrays, open_images
from dcdit.evaluate.measure import evaluate_images
from dcdit.evaluate.report import METRICS, METRICS_KEYS, PICTURE, REPORT, write_report
from dcdit.evaluate.weights import find_weights
from dcdit.sample.drawing import load_for_sampling
from dcdit.sample.kept_share import ensure_kept_share
from dcdit.sample.plan import make_plans
from dcdit.utils.environment import resolve_device
from dcdit.utils.files import claimed
from dcdit.utils.outputs import check_not_read, check_output_file, check_output_folder, check_own
from dcdit.utils.processes import on_main_process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is evaluated").add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", metavar="PATH", help="draw images from it: run or checkpoint folder, or file")
    what.add_argument("--images", metavar="PATH", help="images: a folder, or .npz with arr_0 (ADM) or images")
    add = parser.add_argument_group("against what").add_argument
    add("--extractor", metavar="FILE", help="TorchScript Inception (.pt), or weights for torch-fidelity (.pth)")
    add(
        "--trust-extractor",
        action="store_true",
        help="run a TorchScript extractor that is not a known public one: it is a program, and may do what you may do",
    )
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
    add("--seed", type=seed, default=0, help="of the noise, and of the random choices of the metrics (default 0)")
    add_device_option(add)
    add("--out", default="out/evaluate", metavar="DIR", help="where everything goes (default out/evaluate)")


def run(args: argparse.Namespace) -> None:
    from accelerate import PartialState

    reference = _check(args)
    device = resolve_device(args.device)
    state = PartialState(cpu=device.type == "cpu")
    with on_main_process(state.is_main_process, lambda: claimed(Path(args.out))):
        _evaluate(args, reference, device, state)


def _evaluate(args: argparse.Namespace, reference: str | Statistics | None, device: torch.device, state: Any) -> None:
    out = Path(args.out)
    extractor = None if args.extractor is None else load_extractor(args.extractor, args.resize, args.trust_extractor)
    sampling = None if args.checkpoint is None else _sample(args, out, device, state)
    if not state.is_main_process:
        return
    images = open_images(args.images if sampling is None else out / SAMPLES, args.size)
    if sampling is not None and images.count != args.num:
        raise ValueError(f"{images.name} holds {images.count} images; accepted: {args.num}, as {SAMPLING} says")
    evaluation = None
    if extractor is not None:
        features = extract_features(images, extractor.to(device), cache=args.cache)
        if args.write_statistics is not None:
            features.statistics.save(args.write_statistics)
        evaluation = evaluate_images(
            features,
            reference,
            extractor,
            num_reference=args.num_reference,
            size=args.size,
            cache=args.cache,
            seed=args.seed,
        )
    print(write_report(out, images, args.reference, evaluation, sampling))
    print(f"\n{out / 'report.md'}")


def _sample(
    args: argparse.Namespace, out: Path, device: torch.device, state: Any
) -> tuple[SampleSettings, SamplingCost] | None:
    """Draw the images with all processes of accelerate. Returns None on all but the main one."""
    if state.num_processes > 1:
        device = state.device
    weights = find_weights(args.checkpoint, not args.no_ema, state.is_main_process)
    options = sampling_options(argparse.Namespace(**{**vars(args), "checkpoint": str(weights.file)}))
    model, decode, _ = load_for_sampling(
        options.checkpoint, device, ema=options.ema, precision=options.precision, vae=options.vae
    )
    weights.check()
    if decode is None:
        channels = model.config.in_channels
        raise ValueError(f"{options.checkpoint} makes latents of {channels} channels; --vae decodes them")
    check_fit(options, model)
    ensure_kept_share(model, options, torch.arange(model.config.num_classes, device=device), progress=False)
    (plan,) = make_plans(options, model)
    named = dataclasses.replace(options, checkpoint=args.checkpoint)
    settings = SampleSettings(named, weights.sha256, args.num, plan.name)
    processes = {"rank": state.process_index, "world": state.num_processes, "wait": state.wait_for_everyone}
    cost = generate(model, settings, plan.drop, out, decode, device=device, **processes)
    if state.num_processes > 1:
        state.destroy_process_group()
    return None if cost is None else (settings, cost)


def _check(args: argparse.Namespace) -> str | Statistics | None:
    """What can be wrong without looking at the model: an error here costs no hours of sampling.

    Returns:
        The reference, read if it is statistics alone.
    """
    check_counts(args, "num", "size", "num_reference")
    if args.extractor is None and (args.images or args.reference or args.write_statistics):
        raise ValueError("--images, --reference and --write-statistics need features; give an --extractor")
    if args.extractor is not None:
        importlib.import_module("torchmetrics")  # if it is missing, say so before the work
    _check_outputs(args)
    if args.images is not None and not Path(args.images).is_dir():
        open_images(args.images, args.size)
    if args.reference is None:
        return None
    path = Path(args.reference)
    statistics = Statistics.load(path) if path.suffix == ".npz" and "mu" in npz_arrays(path) else None
    if statistics is not None and not holds_images(path):
        return statistics
    open_images(path, args.size)
    return args.reference


def _check_outputs(args: argparse.Namespace) -> None:
    """Nothing that is read, and nothing of somebody else, is replaced."""
    out = Path(args.out)
    images = {"--images": args.images, "--reference": args.reference}
    if args.extractor is not None:
        check_output_folder(Path(args.cache))
        check_not_read(Path(args.cache), images)
    check_own(out, METRICS, METRICS_KEYS, (REPORT, PICTURE))
    check_not_read(out, images)
    if args.checkpoint is not None:
        check_not_read(out / SAMPLES, images)
    if args.write_statistics is not None:
        statistics = Path(args.write_statistics)
        weights = None if args.checkpoint is None else model_file(args.checkpoint, not args.no_ema)
        check_output_file(statistics)
        check_not_read(statistics, {**images, "--extractor": args.extractor, "--checkpoint": weights})
        written = (SAMPLES, SAMPLING, METRICS, REPORT, PICTURE)
        if os.path.realpath(statistics) in {os.path.realpath(out / name) for name in written}:
            raise ValueError(f"--write-statistics is {statistics}, which --out also writes; accepted: another file")
