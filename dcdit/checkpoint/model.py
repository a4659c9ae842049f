"""Checkpoints: safetensors files that carry the model's configuration, written whole or not at all. Nothing is pickled.

A checkpoint is a folder::

    model.safetensors       weights; the configuration is in the file's metadata
    ema.safetensors         averaged weights, the same way
    optimizer.safetensors   optimiser state by parameter name
    trainer.json            step and training configuration

Each of the first two is a complete model on its own: :func:`load_model` takes the folder or either file.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dcdit.models import DCDiT, DCDiTConfig, DiT, DiTConfig
from dcdit.nn.memory_format import channels_last
from dcdit.utils.files import atomically, remove, stood_aside

Model = DCDiT | DiT
State = Mapping[str, Tensor]

ARCHITECTURES: dict[str, tuple[type[DCDiT], type[DCDiTConfig]] | tuple[type[DiT], type[DiTConfig]]] = {
    "DCDiT": (DCDiT, DCDiTConfig),
    "DiT": (DiT, DiTConfig),
}
FORMAT = "dcdit"
REFERENCE_SUFFIXES = (".pt", ".pth")
MODEL, EMA, OPTIMIZER, TRAINER = "model.safetensors", "ema.safetensors", "optimizer.safetensors", "trainer.json"


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load_checkpoint` read. Tensors are on the CPU."""

    path: Path
    architecture: str
    config: dict[str, Any]
    """The model's configuration."""
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """``<parameter>/<entry>`` to the optimiser's tensors."""
    trainer: dict[str, Any]
    """What the trainer saved beside the weights."""


# --- models -------------------------------------------------------------------------------------------------------


def save_model(
    path: str | Path, model: Model, state: State | None = None, notes: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file with the configuration in its metadata. Atomic.

    Args:
        state: weights to write instead of the model's own, e.g. averaged ones.
        notes: further metadata; ``dcdit sample`` takes its method from ``objective`` ("dit" or "flow").
    """
    metadata = {
        **(notes or {}),
        "format": FORMAT,
        "architecture": type(model).__name__,
        "config": json.dumps(model.config.to_dict()),
    }
    _write_tensors(Path(path), model.state_dict() if state is None else state, metadata)


def load_model(path: str | Path, ema: bool = True) -> Model:
    """A model in eval mode on the CPU, from anything that holds one.

    Args:
        path: a ``.safetensors`` file of :func:`save_model`; a checkpoint folder; a run folder (its newest checkpoint is
            taken); or a ``.pt`` state dict of the DC-DiT reference implementation, which must load without unpickling
            foreign objects.
        ema: of a folder, take the averaged weights.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a damaged file, one that does not say what model it holds, or weights that do not fit it.
    """
    path = Path(path)
    if path.suffix in REFERENCE_SUFFIXES:
        return _load_reference(path, ema)
    path = _model_file(path, ema)
    architecture, config, state = _read_model(path)
    with torch.device("meta"):
        model = _build(architecture, config, path)
    load_weights(model, state, path, assign=True)
    return (channels_last(model) if isinstance(model, DCDiT) else model).eval()


def read_metadata(path: str | Path, ema: bool = True) -> dict[str, str]:
    """What a model's file says about itself, notes included, without reading the weights.

    Path and errors as in :func:`load_model`. Empty for a state dict of the reference implementation.
    """
    path = Path(path)
    return {} if path.suffix in REFERENCE_SUFFIXES else read_tensors(_model_file(path, ema), only_metadata=True)[1]


def _model_file(path: Path, ema: bool) -> Path:
    return find_checkpoint(path) / (EMA if ema else MODEL) if path.is_dir() else path


def _build(architecture: str, config: dict[str, Any], path: Path) -> Model:
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path} holds a {architecture!r}; accepted: {', '.join(ARCHITECTURES)}")
    model_class, config_class = ARCHITECTURES[architecture]
    try:
        return model_class(config_class.from_dict(config))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{path} has a configuration that is not accepted: {error}") from None


def load_weights(model: nn.Module, state: State, source: str | Path, assign: bool = False) -> None:
    """Put weights into a model; they must be exactly its own in name and shape.

    Args:
        assign: put the tensors themselves in (their dtype included) instead of copying their values.

    Raises:
        ValueError: one line that names the source and the first weight that is missing, unknown or of another shape.
    """
    own = model.state_dict()
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
    model.load_state_dict(state, assign=assign)


# --- checkpoints --------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: str | Path,
    model: Model,
    ema: State,
    optimizer: torch.optim.Optimizer,
    trainer: dict[str, Any],
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint folder that appears under its name only when it is complete.

    Args:
        folder: its name; an older checkpoint of that name is replaced.
        ema: averaged weights, with the names of ``model.state_dict()``.
        optimizer: over ``model.parameters()`` in one group.
        trainer: JSON values, e.g. the step.
        notes: as in :func:`save_model`.
    """

    def write(target: Path) -> None:
        target.mkdir()
        save_model(target / MODEL, model, None, notes)
        save_model(target / EMA, model, ema, notes)
        _write_tensors(target / OPTIMIZER, _optimizer_tensors(model, optimizer), {"format": FORMAT})
        atomically(target / TRAINER, lambda file: file.write_text(json.dumps(trainer, indent=2)))

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    atomically(folder, write)
    return folder


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint folder, or the newest of a run folder, completely.

    Raises:
        FileNotFoundError: nothing there, or a file of it is missing.
        ValueError: a damaged file. Both name the checkpoint before it, if there is one.
    """
    folder = find_checkpoint(path)
    trainer = read_trainer(folder)
    with _naming_the_one_before(folder):
        architecture, config, model = _read_model(folder / MODEL)
        _, _, ema = _read_model(folder / EMA)
        optimizer, _ = read_tensors(folder / OPTIMIZER)
    return Checkpoint(folder, architecture, config, model, ema, optimizer, trainer)


def read_trainer(path: str | Path) -> dict[str, Any]:
    """The trainer's part of a checkpoint, without the weights. Errors as in :func:`load_checkpoint`."""
    folder = find_checkpoint(path)
    with _naming_the_one_before(folder):
        return _read_object(folder / TRAINER)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {str(file)!r}; it is no complete checkpoint") from None
    except ValueError:
        raise ValueError(f"{file} is damaged: it is not JSON") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(value).__name__}; accepted: an object")
    return value


@contextlib.contextmanager
def _naming_the_one_before(folder: Path) -> Iterator[None]:
    """Say in errors about a damaged checkpoint of a run which other one there is."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        run = folder.absolute().parents[1]
        before = [other for other in list_checkpoints(run) if other.name < folder.name]
        if not before:
            raise
        raise type(error)(f"{error}; the checkpoint before it can be resumed: --resume {before[-1]}") from None


def load_optimizer(model: Model, optimizer: torch.optim.Optimizer, tensors: State, source: str | Path) -> None:
    """Restore what :func:`save_checkpoint` wrote of an optimiser over ``model.parameters()``."""
    names = [name for name, _ in model.named_parameters()]
    state: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(names))}
    index_of = {name: index for index, name in enumerate(names)}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in index_of:
            raise ValueError(f"{source} has optimiser state for the unknown parameter {name!r}")
        state[index_of[name]][entry] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {i: s for i, s in state.items() if s}, "param_groups": groups})


def find_checkpoint(path: str | Path) -> Path:
    """The folder itself if it is a checkpoint, else the newest under its ``checkpoints/``.

    Raises:
        FileNotFoundError: neither.
    """
    path = Path(path)
    if (path / MODEL).is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        raise FileNotFoundError(f"no checkpoint in {str(path)!r}: no {MODEL}, no checkpoints/step_*/{MODEL}")
    return found[-1]


def list_checkpoints(run: str | Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first.

    Where a process was killed just before it gave a new checkpoint the name of an old one, the old one is listed.
    """
    parent = Path(run) / "checkpoints"
    folders = {path.name: path for path in parent.glob("step_*")} | stood_aside(parent)
    return [folder for _, folder in sorted(folders.items()) if (folder / MODEL).is_file()]


def keep_newest(newest: Path, count: int | None) -> None:
    """Delete all but ``count`` of a run's checkpoints up to ``newest`` (None: delete none).

    Later ones, which a run resumed from an earlier checkpoint has yet to replace, stay and do not count.
    """
    folders = [folder for folder in list_checkpoints(newest.parents[1]) if folder.name <= newest.name]
    for folder in folders[: -count if count else 0]:
        remove(folder)


def checkpoint_path(run: str | Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return Path(run) / "checkpoints" / f"step_{step:08d}"


# --- files --------------------------------------------------------------------------------------------------------


def _read_model(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    state, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT or "config" not in metadata or "architecture" not in metadata:
        raise ValueError(
            f"{path} has no dcdit configuration in its metadata; accepted: files of dcdit.checkpoint.save_model"
        )
    try:
        config = json.loads(metadata["config"])
    except ValueError:
        raise ValueError(f"{path} is damaged: its configuration is not JSON") from None
    return metadata["architecture"], config, state


def read_tensors(path: Path, only_metadata: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of any safetensors file and its metadata. Errors as in :func:`load_model`."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            names = () if only_metadata else file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {' '.join(str(error).split())}") from None


def _write_tensors(path: Path, tensors: State, metadata: dict[str, str]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomically(path, lambda file: save_file(plain, file, metadata))


def _optimizer_tensors(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    names = [name for name, _ in model.named_parameters()]
    return {f"{names[i]}/{entry}": torch.as_tensor(v) for i, entries in state.items() for entry, v in entries.items()}


# --- the reference implementation's files ---------------------------------------------------------------------------


def read_state_dict(path: Path, ema: bool = True) -> dict[str, Tensor]:
    """A state dict that PyTorch pickled, read without unpickling anything but tensors and plain values.

    Args:
        path: the state dict itself, or a training checkpoint with entries ``"ema"`` and ``"model"``. The argparse
            namespace that facebookresearch/DiT adds is plain values and passes.
        ema: take ``"ema"`` rather than ``"model"``.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: the file needs real unpickling, which could run any code, or holds no state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} does not load as plain tensors (weights_only=True): {first}") from None
    if isinstance(state, dict):
        state = state.get("ema" if ema else "model", state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise ValueError(f"{path} holds no state dict; accepted: names to tensors, or a dict with 'ema' and 'model'")
    return state


def _load_reference(path: Path, ema: bool) -> Model:
    from dcdit.models import load_official
    from dcdit.models.presets import SCALES

    state = read_state_dict(path, ema)
    if "pos_embed" not in state:
        raise ValueError(f"{path} has no 'pos_embed'; accepted: a state dict of the DC-DiT reference implementation")
    _, positions, width = state["pos_embed"].shape
    heads = {scale["hidden_size"]: scale["num_heads"] for scale in SCALES.values()}
    if width not in heads:
        widths = ", ".join(map(str, heads))
        raise ValueError(f"{path} has width {width}; accepted: {widths}, others through dcdit.models.load_official")
    # The state dict says neither: presets tell the heads, and from 512 pixels (a grid of 64 x 64) on sigma is 2.
    return load_official(state, num_heads=heads[width], dechunk_sigma=2.0 if positions >= 64 * 64 else 1.0).eval()
