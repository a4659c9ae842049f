"""The options of sampling, which ``dcdit sample`` and ``dcdit evaluate`` share."""

import argparse
import math
from collections.abc import Callable
from typing import Any, Literal

from dcdit.checkpoint import Model, read_metadata
from dcdit.cli.options import check_counts
from dcdit.diffusion import METHODS
from dcdit.diffusion.drop_schedules import FORMS
from dcdit.diffusion.sampling import check_method
from dcdit.models import DCDiT, DiT
from dcdit.sample.options import DEFAULT_METHOD, CostTarget, SamplingOptions
from dcdit.utils.text import short

TARGET_FLAGS = {"TFLOPs": "--target-flops", "seconds": "--target-latency"}
"""The unit of a target to the flag that sets it."""
MOST_STEPS = 100_000


def add_sampling_options(add: Callable[..., Any], budgets: int | str) -> None:
    """Add them to a parser or a group through its ``add_argument``.

    Args:
        budgets: how many drop fractions or schedules a command takes, as argparse's ``nargs``.
    """
    several = "; one picture each" if budgets == "+" else " (default 0)"
    add("--no-ema", action="store_true", help="take the last weights instead of the averaged ones")
    add(
        "--drop-fraction",
        type=float,
        nargs=budgets,
        metavar="RHO",
        help=f"fraction of the kept tokens to drop, in [0, 1){several}",
    )
    add("--drop-schedule", nargs=budgets, metavar="SHAPE", help=f"a fraction that changes from noise to data: {FORMS}")
    add("--null-drop-fraction", type=float, metavar="RHO", help="another one for the unconditional branch (Lite-CFG)")
    add("--budget", type=int, metavar="K", help="keep exactly K tokens per image instead")
    add(
        "--capacity",
        type=_capacity,
        metavar="T",
        help="static size of the packed buffer of a batch: a number of tokens, or auto; what does not fit is dropped",
    )
    add("--steps", type=int, default=250, help="sampling steps (default 250)")
    add("--method", choices=METHODS, help="default: ddpm, or heun for a model trained with the flow objective")
    add("--cfg-scale", type=float, default=1.0, metavar="S", help="classifier-free guidance; 1 is none (default 1)")
    add(
        "--cfg-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide at these times only; 1 is noise, 0 data (default 0 1)",
    )
    add("--batch-size", type=int, default=16, metavar="N", help="images per forward pass (default 16)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="dtype of the weights (default fp32)")
    add(
        "--graph",
        action=argparse.BooleanOptionalAction,
        help="draw with CUDA graphs (default: on a GPU with --budget or --capacity, or a static model)",
    )
    add("--vae", metavar="DIR", help="local diffusers AutoencoderKL that turns latents into pixels")


def sampling_options(args: argparse.Namespace, target: CostTarget | None = None) -> SamplingOptions:
    """The options that a command line gives, with the method that fits the checkpoint where it gives none.

    Args:
        args: parsed by a parser that has the options, ``--checkpoint`` and ``--seed``.
        target: of a command that takes one.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: values out of range, options that contradict one another, or a method that does not fit the
            objective of the checkpoint.
    """
    check_counts(args, "steps", most=MOST_STEPS)
    check_counts(args, "batch_size")
    objective = read_metadata(args.checkpoint, ema=not args.no_ema).get("objective")
    if objective not in (None, *DEFAULT_METHOD):
        raise ValueError(
            f"{args.checkpoint} was trained with the objective {objective!r}; accepted: {', '.join(DEFAULT_METHOD)}"
        )
    method = args.method or DEFAULT_METHOD[objective or "dit"]
    check_method(method, objective, args.checkpoint)
    options = SamplingOptions(
        checkpoint=args.checkpoint,
        method=method,
        ema=not args.no_ema,
        steps=args.steps,
        cfg_scale=args.cfg_scale,
        cfg_interval=None if args.cfg_interval is None else (args.cfg_interval[0], args.cfg_interval[1]),
        null_drop_fraction=args.null_drop_fraction,
        drop_fractions=None if args.drop_fraction is None else tuple(args.drop_fraction),
        drop_schedules=None if args.drop_schedule is None else tuple(args.drop_schedule),
        budget=args.budget,
        capacity=args.capacity,
        target=target,
        seed=args.seed,
        batch_size=args.batch_size,
        precision=args.precision,
        vae=args.vae,
        graph=args.graph,
    )
    _check(options)
    return options


def check_one_budget(flags: list[str]) -> None:
    """Raise ValueError where more than one flag says how many tokens are kept."""
    if len(flags) > 1:
        raise ValueError(f"{' and '.join(flags)} each say how many tokens are kept; accepted: one of them")


def check_fit(options: SamplingOptions, model: Model) -> None:
    """Raise ValueError where the model cannot do what the options ask for."""
    flags = _budget_flags(options)
    if options.null_drop_fraction is not None:
        flags.append("--null-drop-fraction")
    if options.capacity is not None:
        flags.append("--capacity")
    if flags:
        check_dynamic(options, model, flags[0])
    positions = math.prod(model.config.grid)
    if options.budget is not None and not 1 <= options.budget <= positions:
        raise ValueError(f"budget is {options.budget}; accepted: 1 to {positions}, the positions of an image")
    rows = options.batch_size * (1 if options.cfg_scale == 1 else 2)
    if isinstance(options.capacity, int) and not rows <= options.capacity <= rows * positions:
        raise ValueError(
            f"--capacity is {options.capacity}; accepted: auto, or {rows} to {rows * positions}, one token to all "
            f"positions of {rows} images, the most of a model call"
        )


def check_dynamic(options: SamplingOptions, model: Model, flag: str) -> None:
    """Raise ValueError where a flag is given that a model without a router has no use for."""
    if not isinstance(model, DCDiT):
        raise ValueError(
            f"{options.checkpoint} holds a {'static ' * isinstance(model, DiT)}{type(model).__name__}, which drops no "
            f"tokens; leave {flag} out"
        )


def _capacity(text: str) -> int | Literal["auto"]:
    """The value of ``--capacity``, as argparse's ``type``."""
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{short(text)}; accepted: auto, or a number of tokens") from None


def _budget_flags(options: SamplingOptions) -> list[str]:
    """The flags given that each say how many tokens are kept."""
    given = {
        "--drop-fraction": options.drop_fractions,
        "--drop-schedule": options.drop_schedules,
        "--budget": options.budget,
    }
    flags = [flag for flag, value in given.items() if value is not None]
    return flags if options.target is None else [*flags, TARGET_FLAGS[options.target.unit]]


def _check(options: SamplingOptions) -> None:
    """Everything that can be wrong without looking at the model."""
    check_one_budget(_budget_flags(options))
    null = options.null_drop_fraction
    for rho in [*(options.drop_fractions or ()), *([] if null is None else [null])]:
        if not 0 <= rho < 1:
            raise ValueError(f"drop_fraction is {rho}; accepted: a number in [0, 1)")
    if options.graph and options.target is not None and options.target.unit == "seconds":
        raise ValueError("--graph changes the seconds that the pilot of --target-latency measures; leave one out")
    if options.capacity is not None and options.target is not None and options.target.unit == "seconds":
        raise ValueError("--capacity changes the seconds that the pilot of --target-latency measures; leave one out")
    if options.capacity is not None and options.budget is not None:
        raise ValueError(f"--budget {options.budget} fixes the size of the buffer too; leave --capacity out")
    if null is not None and options.budget is not None:
        raise ValueError(f"--budget {options.budget} is for both branches of guidance; leave --null-drop-fraction out")
    for flag, value in {"--null-drop-fraction": null, "--cfg-interval": options.cfg_interval}.items():
        if value is not None and options.cfg_scale == 1:
            raise ValueError(f"{flag} is for guidance; accepted with a --cfg-scale other than 1")
    _ = options.guidance  # checks the interval
