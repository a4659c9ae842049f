"""What is refused before the first step: data, model and configuration that do not fit one another."""

import os
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dcdit import checkpoint as ckpt
from dcdit.checkpoint import Model
from dcdit.config import ModelSection, TrainConfig
from dcdit.data import Samples
from dcdit.models import DCDiTConfig, ModelConfig
from dcdit.models.presets import LATENT_STRIDE
from dcdit.nn import UniformRouter


def local_batch_size(config: TrainConfig, processes: int, model: ModelConfig) -> int:
    """Images per forward pass of one process.

    Raises:
        ValueError: the batch does not divide into such passes, or a pass not into the groups of a loss of this model.
    """
    optim = config.optim
    passes = optim.accumulate * processes
    local_batch, rest = divmod(optim.batch_size, passes)
    if rest or not local_batch:
        raise ValueError(
            f"optim.batch_size is {optim.batch_size}; accepted: a multiple of optim.accumulate times processes = "
            f"{passes}"
        )
    # A group must lie within one forward pass, or its images would depend on how the batch is split.
    split = local_batch < optim.batch_size
    groups = {"router": config.router.group_size} if isinstance(model, DCDiTConfig) else {}
    groups |= {} if model.gate_shape is None else {"width": config.width.group_size}
    for section, group in groups.items():
        if split if group is None else local_batch % group:
            raise ValueError(
                f"{section}.group_size is {'null' if group is None else group}; accepted: a divisor of the "
                f"{local_batch} images per forward pass{'' if split else ', or null'}"
            )
    return local_batch


def check_router(config: TrainConfig, model: ModelConfig) -> None:
    """Raise ValueError where the ratio loss asks for a share of the tokens that this router cannot learn to keep."""
    kept = round(1 / UniformRouter.SHARE)
    if isinstance(model, DCDiTConfig) and model.router == "uniform" and config.router.target != kept:
        raise ValueError(
            f"router.target is {config.router.target:g}; accepted with the uniform router: {kept}, for it keeps one "
            f"position in {kept} whatever the ratio loss asks"
        )


def check_sharding(config: TrainConfig) -> None:
    """Raise ValueError where weights are to be divided over the processes in a way that training does not support."""
    if config.optim.shard and config.optim.compile:
        raise ValueError("optim.shard and optim.compile are both true; accepted: one of them")
    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "").lower() == "true":
            raise ValueError(f"ACCELERATE_USE_{plugin} is true; accepted: false, and optim.shard to divide the weights")


def model_arguments(section: ModelSection, data: Samples) -> dict[str, Any]:
    """What :func:`dcdit.models.create_model` takes. Sizes that the section leaves open are those of the data.

    Raises:
        ValueError: an override of what has a key of its own.
    """
    for name in ("name", "image_size", "num_classes"):
        if name in section.overrides:
            raise ValueError(f"model.overrides has {name!r}; accepted: model.{name} instead")
    channels, height, width = data.shape
    fitting = (LATENT_STRIDE * height, LATENT_STRIDE * width)
    return {
        "name": section.name,
        "image_size": fitting if section.image_size is None else section.image_size,
        "num_classes": len(data.class_names) if section.num_classes is None else section.num_classes,
        "in_channels": channels,
        **section.overrides,
    }


def check_fit(data: Samples, model: Model) -> None:
    """Raise ValueError if the model does not take images of this shape, or has too few classes."""
    config = model.config
    accepted = (config.in_channels, *config.grid)
    if tuple(data.shape) != accepted:
        raise ValueError(
            f"the data has shape {tuple(data.shape)}, the model takes {accepted}; fit data.size, model.image_size or "
            "model.overrides (in_channels, grid)"
        )
    if len(data.class_names) > config.num_classes:
        raise ValueError(f"the data has {len(data.class_names)} classes; model.num_classes is {config.num_classes}")


def check_same_classes(data: Samples, resumed: str | Path) -> None:
    """Raise ValueError if labels of the data mean something else than in the checkpoint that a run goes on from.

    Old checkpoints do not name their classes. Names that only count the labels, as those of an ``.npz``, may become
    more or fewer, and the name of a single class is that of its folder, which may be moved.
    """
    before = ckpt.read_class_names(resumed)
    now = list(data.class_names)
    if not before or before == now or len(before) == len(now) == 1 or (_only_count(before) and _only_count(now)):
        return
    gone, new = [name for name in before if name not in now], [name for name in now if name not in before]
    changes = [*([f"without {_some(gone)}"] if gone else ()), *([f"with {_some(new)}"] if new else ())]
    label, names = next((i, names) for i, names in enumerate(zip_longest(before, now)) if names[0] != names[1])
    raise ValueError(
        f"the data has other classes than {resumed}: {', '.join(changes) or 'in another order'}, so label {label} was "
        f"{names[0]!r} and would be {names[1]!r}; accepted: the classes of the run (for others, begin a new run)"
    )


def _only_count(names: list[str]) -> bool:
    return names == [str(label) for label in range(len(names))]


def _some(names: list[str]) -> str:
    return ", ".join([*map(repr, names[:3]), *([f"and {len(names) - 3} more"] if len(names) > 3 else [])])
