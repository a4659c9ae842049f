"""One model in one safetensors file: its weights, and its configuration in the metadata. Nothing is pickled."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcdit.models import (
    DCDiT,
    DCDiTConfig,
    DiT,
    DiTConfig,
    DyDiT,
    DyDiTConfig,
    KeptShare,
    ModelConfig,
    SparseDiT,
    SparseDiTConfig,
)
from dcdit.utils.files import atomically
from dcdit.utils.finite import first_not_finite
from dcdit.utils.reading import open_regular, parse_json
from dcdit.utils.schema import from_mapping
from dcdit.utils.tensors import open_tensors, save_tensors
from dcdit.utils.text import short

Model = DCDiT | DiT | DyDiT | SparseDiT
"""What this package trains, saves and loads."""
Tensors = Mapping[str, Tensor]
"""Tensors by name."""

ARCHITECTURES: dict[str, tuple[type[Model], type[ModelConfig]]] = {
    "DCDiT": (DCDiT, DCDiTConfig),
    "DiT": (DiT, DiTConfig),
    "DyDiT": (DyDiT, DyDiTConfig),
    "SparseDiT": (SparseDiT, SparseDiTConfig),
}
FORMAT = "dcdit"
"""Entry ``format`` of the metadata. It marks the files of this package."""


def save_model(
    path: str | Path, model: Model, state: Tensors | None = None, notes: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file with the configuration in its metadata. The file appears complete or not at all.

    Args:
        path: of the file. An older file is replaced, and a link is followed.
        state: weights to write instead of the model's own, e.g. averaged ones.
        notes: further metadata. ``objective`` is ``model.objective`` unless the notes say another one.

    Raises:
        FloatingPointError: a weight is not finite. Nothing is written.
        ValueError, OSError: ``path`` is a folder, or the file cannot be written there.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import load_model, save_model
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> save_model("model.safetensors", model, notes={"objective": "flow"})
        >>> load_model("model.safetensors").objective
        'flow'
        >>> _ = torch.nn.init.constant_(model.final_layer.linear.bias, float("nan"))
        >>> save_model("model.safetensors", model)
        Traceback (most recent call last):
            ...
        FloatingPointError: the weights for model.safetensors are not written, because ...
    """
    check_finite(model.state_dict() if state is None else state, f"the weights for {path}")
    atomically(Path(path), lambda file: write_model(file, model, state, notes))


def write_model(path: Path, model: Model, state: Tensors | None, notes: Mapping[str, str] | None) -> None:
    """Write the file of :func:`save_model`, but under its final name from the start and without looking at weights."""
    metadata = {
        **model_notes(model),
        **(notes or {}),
        "format": FORMAT,
        "architecture": architecture_of(model),
        "config": json.dumps(model.config.to_dict()),
    }
    write_tensors(path, model.state_dict() if state is None else state, metadata)


def architecture_of(model: Model) -> str:
    """The name of the model's class in :data:`ARCHITECTURES`, also where PyTorch made a subclass of it.

    Example:
        >>> from dcdit.checkpoint import architecture_of
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> architecture_of(model)
        'DiT'
    """
    return next(name for name, (model_class, _) in ARCHITECTURES.items() if isinstance(model, model_class))


def load_model_file(path: Path) -> Model:
    """The model that :func:`save_model` wrote, in eval mode on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, one without our configuration, or weights that do not fit it.
    """
    architecture, config, weights = read_model_file(path)
    with torch.device("meta"):
        model = _build(architecture, config, path)
    load_weights(model, weights, path, assign=True)
    set_notes(model, read_file_metadata(path), path)
    return model.eval()


def model_notes(model: Model) -> dict[str, str]:
    """What a model knows about itself beside its weights and its configuration, as metadata of a file.

    Example:
        >>> from dcdit.checkpoint import model_notes
        >>> from dcdit.models import KeptShare, create_model
        >>> model = create_model("DC-DiT-S", grid=(4, 4), hidden_size=128, depth=1, num_heads=2, num_classes=10)
        >>> model.kept_share = KeptShare(mean=0.25, std=0.02, largest=0.3, images=16)
        >>> model_notes(model)
        {'kept_share': '{"mean": 0.25, "std": 0.02, "largest": 0.3, "images": 16}'}
    """
    notes = {} if model.objective is None else {"objective": model.objective}
    if isinstance(model, DCDiT) and model.kept_share is not None:
        notes["kept_share"] = json.dumps(asdict(model.kept_share))
    return notes


def set_notes(model: Model, notes: Mapping[str, str], source: str | Path) -> None:
    """The inverse of :func:`model_notes`; other notes are not looked at.

    Args:
        source: of the notes, for the message of the ValueError that a damaged one causes.

    Example:
        >>> from dcdit.checkpoint import model_notes, set_notes
        >>> from dcdit.models import KeptShare, create_model
        >>> model = create_model("DC-DiT-S", grid=(4, 4), hidden_size=128, depth=1, num_heads=2, num_classes=10)
        >>> model.kept_share = KeptShare(mean=0.25, std=0.02, largest=0.3, images=16)
        >>> notes, model.kept_share = model_notes(model), None
        >>> set_notes(model, notes, "a.safetensors")
        >>> model.kept_share.mean
        0.25
    """
    model.objective = notes.get("objective")
    if isinstance(model, DCDiT) and "kept_share" in notes:
        model.kept_share = _read_kept_share(notes["kept_share"], source)


def _read_kept_share(text: str, source: str | Path) -> KeptShare:
    try:
        return from_mapping(KeptShare, parse_json(text, "kept_share"), "kept_share")
    except ValueError as error:
        raise ValueError(f"{source} is damaged: its kept_share is {short(text)}: {error}") from None


def read_model_file(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """(architecture, configuration, weights) of a file of :func:`save_model`. Errors as in :func:`load_model_file`."""
    weights, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT or "config" not in metadata or "architecture" not in metadata:
        raise ValueError(
            f"{path} has no dcdit configuration in its metadata; accepted: files of dcdit.checkpoint.save_model"
        )
    config = parse_json(metadata["config"], f"{path}: its configuration")
    return metadata["architecture"], config, weights


def _build(architecture: str, config: dict[str, Any], path: Path) -> Model:
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path} holds a {architecture!r}; accepted: {', '.join(ARCHITECTURES)}")
    model_class, config_class = ARCHITECTURES[architecture]
    try:
        checked = config_class.from_dict(config)
    except ValueError as error:
        raise ValueError(f"{path} has a configuration that is not accepted: {error}") from None
    return model_class(checked)  # type: ignore[arg-type]


def load_weights(model: nn.Module, state: Tensors, source: str | Path, assign: bool = False) -> None:
    """Put weights into a model. Their names and shapes must be exactly those of the model.

    Args:
        source: where they come from, for error messages.
        assign: use the tensors themselves, dtype included, instead of copying their values.

    Raises:
        ValueError: one line that names the source and the first weight that is missing, unknown or of another shape.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import load_weights
        >>> linear = torch.nn.Linear(2, 1)
        >>> load_weights(linear, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, "a.safetensors")
        >>> linear(torch.ones(1, 2)).item()
        2.0
        >>> load_weights(linear, {"weight": torch.ones(1, 2)}, "a.safetensors")
        Traceback (most recent call last):
            ...
        ValueError: a.safetensors lacks weight 'bias' (1 such); it is of another architecture
    """
    check_fitting(state, model.state_dict(), source)
    model.load_state_dict(state, assign=assign)


def check_fitting(state: Tensors, own: Tensors, source: str | Path) -> None:
    """Raise ValueError, as :func:`load_weights` does, unless ``state`` has the names and shapes of ``own``."""
    for what, names in (("lacks", own.keys() - state.keys()), ("has the unknown", state.keys() - own.keys())):
        if names:
            raise ValueError(
                f"{source} {what} weight {min(names)!r} ({len(names)} such); it is of another architecture"
            )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{source}: {name} has shape {list(state[name].shape)}, the model's is {list(tensor.shape)}"
            )
        if not state[name].is_floating_point():
            raise ValueError(f"{source}: {name} is {state[name].dtype}; accepted: floating-point weights")


def check_finite(tensors: Tensors, what: str) -> None:
    """Raise FloatingPointError if one of the tensors to be written is not finite.

    Args:
        what: they are, in the plural, for the message.
    """
    name = first_not_finite(tensors)
    if name is not None:
        raise FloatingPointError(f"{what} are not written, because {name!r} is not finite")


def refuse_not_finite(tensors: Tensors, source: str | Path) -> None:
    """Raise ValueError if one of the tensors that were read is not finite.

    Args:
        source: where they come from, for the message.
    """
    name = first_not_finite(tensors)
    if name is not None:
        raise ValueError(f"{source} holds numbers that are not finite, in {name!r} for one; its training diverged")


# --- any safetensors file -----------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write a safetensors file from tensors of any device and memory format. OSError if that fails."""
    save_tensors(path, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged or no safetensors file.
    """
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def holds_finite(path: Path) -> bool:
    """Whether a safetensors file can be read and all its numbers are finite."""
    try:
        with open_tensors(path) as file:
            return all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118
    except (FileNotFoundError, ValueError):
        return False


def read_file_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without reading its tensors. Errors as in :func:`read_tensors`."""
    with open_tensors(path) as file:
        return file.metadata() or {}


def class_names_in(metadata: dict[str, str], source: str | Path) -> list[str]:
    """The name of every label, as training notes them; empty where a file does not say them.

    Args:
        metadata: see :func:`dcdit.checkpoint.read_metadata`.
        source: where it comes from, for error messages.

    Raises:
        ValueError: something else stands there.

    Example:
        >>> from dcdit.checkpoint import class_names_in
        >>> class_names_in({"class_names": '["cat", "dog"]'}, "a.safetensors"), class_names_in({}, "b.safetensors")
        (['cat', 'dog'], [])
    """
    try:
        names = parse_json(metadata.get("class_names", "[]"), "class_names")
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{source} is damaged: its class_names are not a list of names")
    return names


def is_written_here(path: Path) -> bool:
    """Whether the header of a safetensors file has the mark of this package; the rest may be cut off. So may be all."""
    size = path.stat().st_size
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            return json.loads(file.read(min(length, size)))["__metadata__"]["format"] == FORMAT
        except (ValueError, LookupError, TypeError, RecursionError):
            return not size
