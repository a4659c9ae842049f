"""What a checkpoint notes about its training, for its model card (:mod:`dcdit.checkpoint.card`)."""

from pathlib import Path
from typing import Any

from dcdit.checkpoint.card import MEASURED
from dcdit.config import DataSection, TrainConfig, to_dict
from dcdit.train.folder import LOG_FILE
from dcdit.train.records import newest_values

PLACES = ("run", "device", "workers")
"""Sections and keys about the machine, which are no part of a recipe."""


def training_facts(config: TrainConfig, step: int, flops: int) -> dict[str, Any]:
    """JSON values: the preset, the data, steps and FLOPs spent, the recipe, and what the log says was measured.

    Paths are reduced to their last part: the weights may be published, the folders of a machine need not be.
    """
    values = newest_values(Path(config.run.out) / LOG_FILE)
    return {
        "model": config.model.name,
        "data": _data(config.data),
        "steps": step,
        "flops": flops,
        "recipe": _different(to_dict(config), to_dict(TrainConfig())),
        "measured": {name: values[name] for name in MEASURED if name in values},
    }


def _data(data: DataSection) -> str:
    return data.kind if data.path is None else f"{data.kind} of {Path(data.path).name}"


def _different(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What differs from the defaults, section by section."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in PLACES or value == defaults.get(key):
            continue
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            if inner := _different(value, defaults[key]):
                found[key] = inner
        else:
            found[key] = Path(value).name if key in ("path", "held_out_path", "source") else value
    return found
