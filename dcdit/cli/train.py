"""``dcdit train``."""

import argparse
import dataclasses
import json

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
TEXTS = ("model.name", "data.kind", "data.path", "optim.precision", "optim.device", "run.out")


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


def run(args: argparse.Namespace) -> None:
    given = {key: getattr(args, key) for key in FLAGS.values() if getattr(args, key) is not None}
    # Quoted where text is wanted, so that YAML does not read a folder called 2024 as a number.
    quoted = {key: json.dumps(value) if key in TEXTS else value for key, value in given.items()}
    overrides = [*args.set, *(f"{key}={value}" for key, value in quoted.items())]
    if args.resume is None:
        settings = config.load_config(args.config, overrides)
    elif args.config is not None:
        raise ValueError(
            "--resume continues with the run's own configuration; change single keys with --set, not --config"
        )
    else:
        stored = checkpoint.read_trainer(args.resume).get("config")
        settings = config.override(stored or {}, overrides)
    result = train(settings, resume=args.resume)
    if result.main_process:
        print(f"{result.reason}: {result.step} steps done; checkpoint {result.checkpoint}, log {result.log}")
