"""``dcdit train``: train a DC-DiT or a static DiT."""

import argparse
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from dcdit import checkpoint, config
from dcdit.cli.configurations import annotated, dry_run, list_configs
from dcdit.models.presets import check_preset
from dcdit.train.folder import CONFIG_FILE
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
PLACES = ("data.path", "data.held_out_path", "upcycle.source", "run.trackers")
"""What a run reads and where it sends records. A checkpoint, which may be a stranger's, does not decide that."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "configuration keys (for the YAML file and --set):\n\n" + config.describe()
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="a recipe of this package (--list-configs) or a YAML file; keys it leaves out take their defaults",
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override one key, e.g. optim.lr=1e-4"
    )
    parser.add_argument(
        "--resume", metavar="DIR", help="continue this run (or checkpoint) with its own configuration and in its folder"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list-configs", action="store_true", help="show the recipes of this package and stop")
    instead.add_argument(
        "--print-config",
        action="store_true",
        help="show what the run would use, as YAML that --config reads, with the meaning of every key, and stop",
    )
    instead.add_argument(
        "--dry-run", action="store_true", help="check data, model and folder, show what the run would cost, and stop"
    )
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
    if args.list_configs:
        print(list_configs())
        return 0
    flags = {key: getattr(args, key) for key in FLAGS.values()}
    typed = {key: config.parse_value(key, text) for key, text in flags.items() if text is not None}
    overrides = {**values, **config.parse_overrides(args.set), **typed}
    if args.resume is None:
        settings = _load(args.config, functools.partial(config.load_config, args.config), overrides)
    elif args.config is not None:
        raise ValueError(
            "--resume continues with the run's own configuration; change single keys with --set, not --config"
        )
    else:
        settings = _resumed(args.resume, overrides)
    if args.print_config:
        print(annotated(settings))
        return 0
    if args.dry_run:
        print(dry_run(settings, args.resume))
        return 0
    begun = 0 if args.resume is None else checkpoint.read_trainer(args.resume).get("step", 0)
    result = train(settings, resume=args.resume)
    if result.main_process and result.reason == "steps" and result.step == begun:
        print(f"no step was left: {begun} are done, and optim.steps is {settings.optim.steps}; --steps asks for more")
    elif result.main_process:
        print(f"{result.reason}: {result.step} steps done; checkpoint {result.checkpoint}, log {result.log}")
    return 128 + result.signal if result.signal else 0


def _load(
    source: str | None, load: Callable[[Mapping[str, Any]], config.TrainConfig], overrides: Mapping[str, Any]
) -> config.TrainConfig:
    """A configuration with overrides. An error in it names its source, unless the overrides have put it there."""
    try:
        return _checked(load(overrides))
    except ValueError as error:
        if source is None or str(error).startswith(source):
            raise
        try:
            _checked(load({}))
        except ValueError as own:
            raise type(own)(f"{source}: {own}") from None
        raise


def _checked(settings: config.TrainConfig) -> config.TrainConfig:
    """The configuration itself. ValueError if its model can never be made, before any data is read."""
    overrides = {k: v for k, v in settings.model.overrides.items() if k not in ("name", "image_size", "num_classes")}
    try:
        check_preset(settings.model.name, overrides)
    except ValueError as error:
        raise ValueError(f"model: {error}") from None
    return settings


def _resumed(resume: str, overrides: Mapping[str, Any]) -> config.TrainConfig:
    """The configuration of a checkpoint, except for the places, which are those of the run's config.yaml.

    Raises:
        ValueError: another --out than the run's folder, or no config.yaml and a place that is not given.
    """
    folder = checkpoint.run_folder(resume)
    out = str(overrides.get("run.out", folder))
    if os.path.realpath(out) != os.path.realpath(folder):
        raise ValueError(
            f"--out is {out}, but --resume goes on in {folder}; leave --out away, or copy the run and resume the copy"
        )
    trainer = checkpoint.read_trainer(resume)
    stored = trainer.get("config")
    if not isinstance(stored, dict):
        where = checkpoint.find_checkpoint(resume) / checkpoint.TRAINER_FILE
        raise ValueError(f"{where} has the config {stored!r}; accepted: an object")
    name = _value(stored, "model.name")
    if (wanted := overrides.get("model.name", name)) != name:
        raise ValueError(
            f"model.name is {wanted!r}, but {resume} trains {name!r}; accepted: a new run for another model"
        )
    file = folder / CONFIG_FILE
    own = config.given_keys(file) if file.is_file() else {}
    for key in PLACES:
        if not own and key not in overrides and _value(stored, key) is not None:
            raise ValueError(
                f"{folder} has no {CONFIG_FILE}, and {key} is not taken from a checkpoint ({_value(stored, key)!r}); "
                f"give --set {key}=..."
            )
    places = {key: _value(own, key) for key in PLACES}
    source = str(checkpoint.find_checkpoint(resume) / checkpoint.TRAINER_FILE)
    return _load(source, lambda given: config.override(stored, {**places, **given, "run.out": str(folder)}), overrides)


def _value(data: dict[str, Any], key: str) -> Any:
    section, name = key.split(".")
    values = data.get(section)
    return values.get(name) if isinstance(values, dict) else None
