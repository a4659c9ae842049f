"""``dcdit train``: train a DC-DiT or a static DiT."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from dcdit import checkpoint, config
from dcdit.train.loop import train

FLAGS = {
    "--model": "model.name",
    "--data": "data.kind",
    "--data-path": "data.path",
    "--steps": "optim.steps",
    "--flops": "optim.flops",
    "--batch-size": "optim.batch_size",
    "--lr": "optim.lr",
    "--precision": "optim.precision",
    "--device": "optim.device",
    "--seed": "optim.seed",
    "--minutes": "run.minutes",
    "--out": "run.out",
}
"""Flags that are short for ``--set key=value``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "configuration keys (for the YAML file and --set):\n\n" + config.describe()
    parser.add_argument("--config", metavar="FILE", help="YAML file; keys it leaves out take their defaults")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override one key, e.g. optim.lr=1e-4"
    )
    parser.add_argument("--resume", metavar="DIR", help="continue this run (or checkpoint) with its own configuration")
    for flag, key in FLAGS.items():
        section, name = key.split(".")
        (option,) = (o for o in dataclasses.fields(getattr(config.TrainConfig(), section)) if o.name == name)
        parser.add_argument(flag, dest=key, metavar="VALUE", help=f"{option.metadata['doc']} ({key})")


def run(args: argparse.Namespace) -> int:
    return start(args, {})


def start(args: argparse.Namespace, values: Mapping[str, Any]) -> int:
    """Train with the configuration of the command line; returns the exit code.

    Args:
        args: parsed arguments.
        values: ``section.key`` to value; they override the file, and ``--set`` and the other flags override them.
    """
    flags = {key: getattr(args, key) for key in FLAGS.values()}
    typed = {key: config.parse_value(key, text) for key, text in flags.items() if text is not None}
    overrides = {**values, **config.parse_overrides(args.set), **typed}
    if args.resume is None:
        settings = config.load_config(args.config, overrides)
    elif args.config is not None:
        raise ValueError(
            "--resume continues with the run's own configuration; change single keys with --set, not --config"
        )
    else:
        settings = config.override(checkpoint.read_trainer(args.resume).get("config") or {}, overrides)
    result = train(settings, resume=args.resume)
    if result.main_process:
        print(f"{result.reason}: {result.step} steps done; checkpoint {result.checkpoint}, log {result.log}")
    return 128 + result.signal if result.signal else 0
