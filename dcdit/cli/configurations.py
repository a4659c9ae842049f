"""What ``dcdit train`` says about a configuration without training: recipes, every key, and what a run would cost."""

import ast
import dataclasses
import inspect
import itertools
import json
import re
import textwrap
import typing
from pathlib import Path
from typing import Any

import torch

from dcdit import config
from dcdit.config import TrainConfig
from dcdit.data import create_dataset
from dcdit.models import DCDiTConfig, count_flops, create_config, create_model
from dcdit.models.presets import PRESET_FORMS, config_class
from dcdit.train.checks import check_fit, check_router, local_batch_size, model_arguments
from dcdit.train.compute import FORWARD_AND_BACKWARD
from dcdit.train.folder import check_folder, placed
from dcdit.utils import schema

WIDTH = 118
STATE_BYTES = 20
"""Per parameter: weight, gradient, two moments of AdamW, and average, in float32."""


def list_configs() -> str:
    """The recipes, one per line, and the presets that ``--model`` takes."""
    paths = config.recipes()
    width = max(map(len, paths))
    lines = [f"{name:<{width}}  {_first_sentence(path)}" for name, path in paths.items()]
    return "\n".join([*lines, "", f"presets for --model: {PRESET_FORMS}"])


def annotated(settings: TrainConfig) -> str:
    """The configuration as YAML that ``--config`` reads, with meaning, type, bounds and default of every key.

    ``model.overrides`` is followed by the fields that it may hold, as comments, with the preset's values.
    """
    lines = []
    for section in dataclasses.fields(settings):
        values = getattr(settings, section.name)
        lines.append(f"{section.name}: # {schema.meaning(type(values))}")
        for field in dataclasses.fields(values):
            lines += _comment(f"{field.metadata['doc']} ({schema.about(type(values), field)})")
            lines.append(_value(field.name, getattr(values, field.name)))
            if (section.name, field.name) == ("model", "overrides"):
                lines += _model_fields(settings)
        lines.append("")
    return "\n".join(lines).rstrip()


def dry_run(settings: TrainConfig, resume: str | None = None) -> str:
    """What a run would read, train and cost. Nothing is written, and the model is not built in memory.

    Raises:
        ValueError, FileNotFoundError: what would stop the run before its first step.
    """
    settings = placed(settings, resume)
    check_folder(settings, resume)
    data = create_dataset(settings.data, "train", settings.optim.seed, settings.model.num_classes)
    with torch.device("meta"):
        model = create_model(**model_arguments(settings.model, data))
    check_fit(data, model)
    check_router(settings, model.config)
    local_batch_size(settings, 1, model.config)
    optim = settings.optim
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lengths = None
    if isinstance(model.config, DCDiTConfig):
        lengths = max(1, round(model.config.grid[0] * model.config.grid[1] / settings.router.target))
    image = count_flops(model.config, lengths)["total"]
    kept = "" if lengths is None else f" with {lengths} kept tokens, the router's target"
    step = FORWARD_AND_BACKWARD * image * optim.batch_size
    size = " x ".join(map(str, data.shape))
    rows = {
        "data": f"{settings.data.kind}: {size}, {len(data.class_names)} classes",
        "model": f"{settings.model.name}: {parameters / 1e6:.4g} M parameters",
        "FLOPs": f"{image / 1e9:.4g} GFLOPs per image and forward pass{kept}",
        "run": f"{optim.steps:,} steps of {optim.batch_size} images",
        "cost": f"{step / 1e12:.4g} TFLOPs per step, {optim.steps * step:.3g} FLOPs in all, nothing dropped",
        "memory": f"{parameters * STATE_BYTES / 1e9:.3g} GB for weights, gradients, moments, averages; no activations",
        "folder": f"{settings.run.out}: {'goes on' if resume else 'free'}",
    }
    return "\n".join(f"{name:<7} {text}" for name, text in rows.items())


def _first_sentence(path: Path) -> str:
    """Of the comment at the top of a recipe."""
    comment = " ".join(line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    return comment.partition(". ")[0].partition(", on latents")[0].partition("; ")[0].removesuffix(".")


def _comment(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ", break_on_hyphens=False
    )


def _plain(docstring: str) -> str:
    """Its text on one line, without the marks of names and of code."""
    return " ".join(re.sub(r":\w+:`~?([^`]*)`", r"\1", docstring).replace("``", "").split())


def _value(name: str, value: Any) -> str:
    """A key and its value. JSON is YAML; a mapping that is too long for one line takes one for each of its keys."""
    line = f"  {name}: {json.dumps(value)}"
    if len(line) <= WIDTH or not isinstance(value, dict):
        return line
    return f"  {name}: {json.dumps(value, indent=2)}".replace("\n", "\n  ")


def _model_fields(settings: TrainConfig) -> list[str]:
    """Comments: what ``model.overrides`` may hold, with the values that the model gets."""
    section = settings.model
    sizes = {"image_size": section.image_size or 256, "num_classes": section.num_classes or 1000}
    fields = create_config(section.name, **{**sizes, **section.overrides}).to_dict()
    del fields["num_classes"]  # it has a key of its own
    told_by_data = {"in_channels", *(["grid"] if section.image_size is None else [])} - set(section.overrides)
    docs = attribute_docs(config_class(section.name))
    lines = ["  # fields that it may hold, and their values here:"]
    for name, value in fields.items():
        meaning = f": {_plain(docs[name])}" if name in docs else ""
        lines += _comment(f"  {name} = {'as the data' if name in told_by_data else json.dumps(value)}{meaning}")
    return lines


def attribute_docs(cls: type) -> dict[str, str]:
    """The text under each field of a dataclass and of its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = typing.cast(ast.ClassDef, tree).body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                docs[typing.cast(ast.Name, field.target).id] = str(text.value.value)
    return docs
