"""``dcdit sample``: images from a checkpoint at one or more budgets, and what the router kept on the way."""

import argparse
import importlib
import json
import math
import time
from pathlib import Path

from dcdit.checkpoint import class_names_in
from dcdit.cli.options import add_device_option, check_counts, seed
from dcdit.cli.sampling_options import (
    TARGET_FLAGS,
    add_sampling_options,
    check_dynamic,
    check_fit,
    check_one_budget,
    sampling_options,
)
from dcdit.models import SlicedModel
from dcdit.sample.classes import class_numbers
from dcdit.sample.drawing import class_labels, draw, load_for_sampling
from dcdit.sample.kept_share import ensure_kept_share
from dcdit.sample.options import CostTarget
from dcdit.sample.output import RECORD, TRACED, check_folder, describe, describe_run, write_images
from dcdit.sample.plan import Plan, make_plans
from dcdit.sample.sampled import ready_to_sample
from dcdit.utils.environment import resolve_device
from dcdit.utils.files import write_text
from dcdit.utils.outputs import check_output_folder

MOST_IN_MEMORY = 100_000
"""Images of one call, which holds all of them; ``dcdit evaluate`` draws more, batch by batch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="run or checkpoint folder, .safetensors file, or official .pt",
    )
    add_sampling_options(add, budgets="+")
    add(
        "--target-flops",
        type=float,
        metavar="TFLOPS",
        help="choose the drop fraction that spends so many TFLOPs per image over the whole run",
    )
    add(
        "--target-latency",
        type=float,
        metavar="SECONDS",
        help="choose the drop fraction that takes so many seconds per image, decoding not counted",
    )
    add("--profile", metavar="JSON", help="a profile.json to choose by, instead of a short pilot run here")
    add("--labels", nargs="+", metavar="N", help="classes to draw, by number or by name (default: all, at most 16)")
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--num-per-class", type=int, default=1, metavar="N", help="images of each label (default 1)")
    count.add_argument("--num", type=int, metavar="N", help="images in all, labels taking turns")
    add("--seed", type=seed, default=0, help="fixes the noise; all drop fractions share it (default 0)")
    add_device_option(add)
    add("--individual", action="store_true", help="also write every image as its own PNG")
    add("--report", action="store_true", help="also write report.html and report.md: kept tokens step by step, FLOPs")
    add(
        "--out",
        default="out/samples",
        metavar="DIR",
        help="where the pictures (latents without --vae: .npz) and samples.json go (default out/samples)",
    )


def run(args: argparse.Namespace) -> None:
    check_counts(args, "num_per_class", "num", most=MOST_IN_MEMORY)
    options = sampling_options(args, _target(args))
    out = Path(args.out)
    check_output_folder(out)
    importlib.import_module("PIL")  # if it is missing, say so before the work
    device = resolve_device(args.device)
    model, decode, notes = load_for_sampling(
        options.checkpoint, device, ema=options.ema, precision=options.precision, vae=options.vae
    )
    names = class_names_in(notes, options.checkpoint)
    classes = model.config.num_classes
    labels = class_labels(classes, _chosen(args, names, classes), args.num_per_class, args.num)
    check_fit(options, model)
    if args.report:
        check_dynamic(options, model, "--report")
        importlib.import_module("matplotlib")
    sampled = ready_to_sample(model, options)  # if there can be none, say so before the work
    ensure_kept_share(model, options, labels.to(device))
    plans = make_plans(options, model, labels.to(device))
    if options.target is not None:
        _print_choice(plans[0])
    check_folder(out, plans, args.individual, args.report)
    columns = args.num_per_class if args.num is None and args.num_per_class > 1 else None
    facts, traced = describe(options, model, labels, names, device), []
    if isinstance(sampled.model, SlicedModel):
        facts["sliced_bytes"] = sampled.model.nbytes
        print(f"the weights of all widths take {sampled.model.nbytes / 2**20:.1f} MiB beside the model's own")
    write_text(out / RECORD, json.dumps(facts, indent=2))
    for plan in plans:
        began = time.perf_counter()
        drawn = draw(model, options, labels.to(device), plan.drop, trace=TRACED * args.report, sampled=sampled)
        seconds = time.perf_counter() - began
        files = write_images(
            out,
            plan.name,
            drawn.x,
            labels,
            decode,
            class_names=names,
            batch_size=options.batch_size,
            columns=columns,
            individual=args.individual,
        )
        entry = describe_run(plan, drawn, seconds, files)
        facts["runs"].append(entry)
        write_text(out / RECORD, json.dumps(facts, indent=2))
        traced.append(drawn.traced)
        kept = f", kept {entry['kept']:.1%} of the tokens" if "kept" in entry else ""
        lost = f", lost {entry['overflow']} of them to the capacity" if "overflow" in entry else ""
        cost = f"{entry['tflops_per_image']:.4g} TFLOPs and {entry['seconds_per_image']:.3g} s per image"
        print(f"{files[0]}: {len(labels)} images{kept}{lost}, {cost}")
    if args.report:
        from dcdit.sample.report import write_report

        print(f"wrote {write_report(out, facts, traced, decode)}")


def _chosen(args: argparse.Namespace, names: list[str], classes: int) -> list[int] | None:
    """The numbers of ``--labels``. A text of digits is a number, whatever the names are."""
    if args.labels is None:
        return None
    labels = [int(label) if label.removeprefix("-").isdecimal() else label for label in args.labels]
    return class_numbers(labels, names, classes, args.checkpoint)


def _target(args: argparse.Namespace) -> CostTarget | None:
    costs = {"TFLOPs": args.target_flops, "seconds": args.target_latency}
    given = {unit: cost for unit, cost in costs.items() if cost is not None}
    check_one_budget([TARGET_FLAGS[unit] for unit in given])
    for unit, cost in given.items():
        if not 0 < cost < math.inf:
            raise ValueError(f"{TARGET_FLAGS[unit]} is {cost}; accepted: a positive number")
    if args.profile is not None and "seconds" not in given:
        raise ValueError("--profile is for --target-latency; FLOPs are counted")
    return next((CostTarget(cost, unit, args.profile) for unit, cost in given.items()), None)


def _print_choice(plan: Plan) -> None:
    choice = plan.summary["target"]
    for warning in choice["warnings"]:
        print(f"warning: the target may be missed: {warning}")
    print(
        f"target {choice['target']:g} {choice['unit']} per image: drop fraction {plan.summary['drop_fraction']:.3f}, "
        f"which should take {choice['expected']:.4g} ({choice['source']})"
    )
