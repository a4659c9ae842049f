"""``dcdit upcycle``: training of a DC-DiT that starts from a pretrained static DiT."""

import argparse
import json
from typing import Any

from dcdit import config
from dcdit.checkpoint.pretrained import load_static_dit, read_objective
from dcdit.cli import train as command
from dcdit.models.presets import LATENT_STRIDE
from dcdit.models.upcycle import upcycled_fields


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PATH",
        help="the static DiT: .pt of facebookresearch/DiT, .safetensors, a run of dcdit, or a folder of diffusers",
    )
    parser.add_argument(
        "--num-heads", type=int, metavar="N", help="attention heads of a state dict of no published width"
    )
    command.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if (args.source is None) == (args.resume is None):
        raise ValueError("give --from to start, or --resume to continue a run (which knows where it came from)")
    if args.source is not None:
        args.set = [*_taken_over(args), f"upcycle.source={json.dumps(args.source)}", *args.set]
    command.run(args)


def _taken_over(args: argparse.Namespace) -> list[str]:
    """Overrides that describe the DC-DiT of the source's transformer. What the user says stays; training checks it."""
    given = config.given_keys(args.config, args.set)
    config.from_dict(given)  # what is wrong with it by itself is said first
    source = load_static_dit(args.source, args.num_heads).config
    fields = upcycled_fields(source)
    model: dict[str, Any] = {"num_classes": fields.pop("num_classes"), "image_size": LATENT_STRIDE * max(source.grid)}
    sections = {"model": model, "diffusion": {"objective": read_objective(args.source)}}
    found = {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in values.items()
        if value is not None and key not in (given.get(section) or {})
    }
    overrides = (given.get("model") or {}).get("overrides") or {}
    found |= {f"model.overrides.{key}": value for key, value in fields.items() if key not in overrides}
    return [f"{key}={json.dumps(value)}" for key, value in found.items()]
