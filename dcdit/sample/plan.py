"""From the budgets on the command line of ``dcdit sample`` to what each set of pictures drops."""

import argparse
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dcdit.checkpoint import Model
from dcdit.diffusion import parse_drop_schedule
from dcdit.diffusion.guidance import Fraction
from dcdit.models import DCDiT
from dcdit.sample.budget import CostTable, Guidance, measure_costs, seconds_from_profile
from dcdit.sample.model_calls import call_times

BUDGETS = ("drop_fraction", "drop_schedule", "budget", "target_flops", "target_latency")
"""Options of which each says on its own how many tokens are kept."""


@dataclass(frozen=True)
class Plan:
    """One set of pictures and how much it drops."""

    name: str
    """Of its files."""
    drop: Fraction | None
    """None leaves the option out."""
    told: dict[str, Any]
    """What samples.json says of it."""


def guidance_of(args: argparse.Namespace) -> Guidance:
    interval = None if args.cfg_interval is None else (args.cfg_interval[0], args.cfg_interval[1])
    return Guidance(args.cfg_scale, interval, args.null_drop_fraction)


def device_name(device: torch.device) -> str:
    """As ``dcdit profile`` writes it down."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def check_budget(args: argparse.Namespace, model: Model) -> None:
    """Everything that can be wrong with the options on budgets, before anything runs."""
    given = [f"--{name.replace('_', '-')}" for name in BUDGETS if getattr(args, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} each say how many tokens are kept; accepted: one of them")
    null = args.null_drop_fraction
    for rho in [*(args.drop_fraction or ()), *([] if null is None else [null])]:
        if not 0 <= rho < 1:
            raise ValueError(f"drop_fraction is {rho}; accepted: a number in [0, 1)")
    if (given or null is not None or args.report) and not isinstance(model, DCDiT):
        flag = [*given, "--null-drop-fraction" if null is not None else "--report"][0]
        raise ValueError(
            f"{args.checkpoint} holds a static {type(model).__name__}, which drops no tokens; leave {flag} out"
        )
    if null is not None and args.budget is not None:
        raise ValueError(f"--budget {args.budget} is for both branches of guidance; leave --null-drop-fraction out")
    for name in ("null_drop_fraction", "cfg_interval"):
        if getattr(args, name) is not None and args.cfg_scale == 1:
            raise ValueError(f"--{name.replace('_', '-')} is for guidance; accepted with a --cfg-scale other than 1")
    guidance_of(args)
    positions = math.prod(model.config.grid)
    if args.budget is not None and not 1 <= args.budget <= positions:
        raise ValueError(f"budget is {args.budget}; accepted: 1 to {positions}, the positions of an image")
    for name in ("target_flops", "target_latency"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; accepted: a positive number")
    if args.profile is not None and args.target_latency is None:
        raise ValueError("--profile is for --target-latency; FLOPs are counted")


def make_plans(args: argparse.Namespace, model: Model, labels: Tensor, method: str, clip: bool) -> list[Plan]:
    """A plan for each budget on the command line; a target is turned into a drop fraction by measuring."""
    if not isinstance(model, DCDiT) or args.budget is not None:
        return [Plan("samples", None, {"drop_fraction": None})]
    if args.drop_schedule is not None:
        return [
            Plan(f"schedule_{text.replace(':', '_')}", parse_drop_schedule(text), {"drop_schedule": text})
            for text in args.drop_schedule
        ]
    if args.target_flops is None and args.target_latency is None:
        return [Plan(f"drop_{rho:g}", rho, {"drop_fraction": rho}) for rho in args.drop_fraction or [0.0]]
    target = args.target_flops or args.target_latency
    table = _cost_table(args, model, labels, method, clip)
    rho, cost = table.choose(target)
    chosen = f"drop fraction {rho:.3f}, which should take {cost:.4g} ({table.source})"
    print(f"target {target:g} {table.unit} per image: {chosen}")
    told = {"target": target, "expected": cost, **asdict(table)}
    return [Plan(f"drop_{rho:.3f}", rho, {"drop_fraction": rho, "target": told})]


def _cost_table(args: argparse.Namespace, model: DCDiT, labels: Tensor, method: str, clip: bool) -> CostTable:
    guidance = guidance_of(args)
    if args.profile is not None:
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[args.precision]
        times = call_times(method, args.steps)
        return seconds_from_profile(args.profile, times, guidance, device_name(labels.device), dtype)
    batch = labels[: args.batch_size]
    tflops, seconds = measure_costs(model, batch, args.steps, method, guidance, seed=args.seed, clip=clip)
    return seconds if args.target_flops is None else tflops
