"""``dcdit upcycle``: train a DC-DiT that starts from a pretrained static DiT."""

import argparse
from typing import Any

from dcdit import config
from dcdit.checkpoint.pretrained import load_static_dit, read_objective
from dcdit.cli import train
from dcdit.cli.options import check_counts
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
    train.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    check_counts(args, "num_heads")
    if (args.source is None) == (args.resume is None):
        raise ValueError("give --from to start, or --resume to continue a run (whose configuration names its source)")
    return train.start(args, {} if args.source is None else _from_source(args))


def _from_source(args: argparse.Namespace) -> dict[str, Any]:
    """``section.key`` to value for a DC-DiT with the transformer of the source. What the user gives is left out."""
    given = config.given_keys(args.config, args.set)
    config.from_dict(given)  # an error in what the user gives comes before one in the source
    source = load_static_dit(args.source, args.num_heads).config
    fields = upcycled_fields(source)
    values = {
        "model.num_classes": fields.pop("num_classes"),
        "model.image_size": LATENT_STRIDE * max(source.grid),
        "diffusion.objective": read_objective(args.source),
        **{f"model.overrides.{name}": value for name, value in fields.items()},
    }
    taken = {key: value for key, value in values.items() if value is not None and not _has(given, key)}
    return {"upcycle.source": args.source, **taken}


def _has(data: Any, key: str) -> bool:
    """Whether nested dicts hold ``section.key``."""
    for part in key.split("."):
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True
