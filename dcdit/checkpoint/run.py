"""Checkpoints of a training run. Each is a folder that appears complete or not at all::

    runs/a/checkpoints/step_00010000/
        model.safetensors       weights; the model's configuration is in the metadata
        ema.safetensors         averaged weights, in the same form
        optimizer.safetensors   optimiser state by parameter name
        trainer.json            step, training configuration, and where a stream of samples is
        README.md               the model card: what is known of the model, its data, its training and its quality

Each of the first two files is a complete model on its own: :func:`dcdit.checkpoint.load_model` takes the run, the
checkpoint or the file.
"""

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcdit.checkpoint.card import CARD_FILE, model_card
from dcdit.checkpoint.folders import (
    EMA_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    TENSOR_FILES,
    TRAINER_FILE,
    find_checkpoint,
    is_checkpoint,
    list_checkpoints,
)
from dcdit.checkpoint.model import (
    FORMAT,
    Model,
    Tensors,
    check_finite,
    class_names_in,
    holds_finite,
    read_file_metadata,
    read_model_file,
    read_tensors,
    refuse_not_finite,
    write_model,
    write_tensors,
)
from dcdit.checkpoint.optimizer import optimizer_tensors
from dcdit.utils.files import remove_folder, replace_folder
from dcdit.utils.reading import read_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What :func:`load_checkpoint` read. Tensors are on the CPU.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> adam = torch.optim.AdamW(model.parameters())
        >>> for step in (10, 20):
        ...     path = save_checkpoint(checkpoint_path("runs/a", step), model, model.state_dict(), adam, {"step": step})
        >>> checkpoint = load_checkpoint("runs/a")  # the newest
        >>> checkpoint.path.name, checkpoint.architecture, checkpoint.trainer
        ('step_00000020', 'DiT', {'step': 20})
    """

    path: Path
    architecture: str
    config: dict[str, Any]
    """The model's configuration."""
    model: dict[str, Tensor]
    """Weights by name."""
    ema: dict[str, Tensor]
    """Averaged weights by name."""
    optimizer: dict[str, Tensor]
    """The optimiser's tensors by ``<parameter>/<entry>``."""
    trainer: dict[str, Any]
    """What the trainer saved beside the weights."""


def save_checkpoint(
    folder: str | Path,
    model: Model,
    ema: Tensors,
    optimizer: torch.optim.Optimizer | Tensors,
    trainer: dict[str, Any],
    notes: Mapping[str, str] | None = None,
    state: Tensors | None = None,
) -> Path:
    """Write a checkpoint folder. It appears under its name only when it is complete.

    Args:
        folder: its name. An older checkpoint of that name is replaced, and a link is followed.
        ema: averaged weights, with the names of ``model.state_dict()``.
        optimizer: over ``model.parameters()`` in one group, or its :func:`optimizer_tensors`.
        trainer: JSON values, e.g. the step.
        notes, state: as in :func:`dcdit.checkpoint.save_model`.

    Raises:
        ValueError: ``folder`` exists and is no checkpoint (:func:`is_checkpoint`).
        FloatingPointError: one of the tensors is not finite. Nothing is written.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import checkpoint_path, save_checkpoint
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> adam = torch.optim.AdamW(model.parameters())
        >>> path = save_checkpoint(checkpoint_path("runs/a", 10), model, model.state_dict(), adam, {"step": 10})
        >>> path.name, sorted(file.name for file in path.glob("*.safetensors"))
        ('step_00000010', ['ema.safetensors', 'model.safetensors', 'optimizer.safetensors'])
    """
    folder = Path(folder)
    weights = model.state_dict() if state is None else state
    moments = optimizer_tensors(model, optimizer) if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    for what, checked in (("weights", weights), ("averaged weights", ema), ("moments", moments)):
        check_finite(checked, f"the {what} for {folder}")

    def write(target: Path) -> None:
        target.mkdir()
        write_model(target / MODEL_FILE, model, weights, notes)
        write_model(target / EMA_FILE, model, ema, notes)
        write_tensors(target / OPTIMIZER_FILE, moments, {"format": FORMAT})
        (target / TRAINER_FILE).write_text(json.dumps(trainer, indent=2), encoding="utf-8")
        (target / CARD_FILE).write_text(model_card(model, notes), encoding="utf-8")

    if folder.exists() and not is_checkpoint(folder):
        raise ValueError(f"{folder} is no checkpoint of dcdit; accepted: a checkpoint, or a name that is free")
    replace_folder(folder, write)
    _known.update({_state_of(folder / name): True for name in TENSOR_FILES})
    return folder


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read all of a checkpoint folder, or of the newest checkpoint of a run folder.

    Raises:
        FileNotFoundError: nothing there, or one of its files is missing.
        ValueError: a damaged file, or numbers that are not finite. Both errors name the newest earlier checkpoint of
            the run that a run can go on from, if there is one.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> adam = torch.optim.AdamW(model.parameters())
        >>> for step in (10, 20):
        ...     path = save_checkpoint(checkpoint_path("runs/a", step), model, model.state_dict(), adam, {"step": step})
        >>> checkpoint = load_checkpoint("runs/a")
        >>> checkpoint.trainer["step"], torch.equal(checkpoint.model["blocks.0.fc1.weight"], model.blocks[0].fc1.weight)
        (20, True)
    """
    folder = find_checkpoint(path)
    trainer = read_trainer(folder)
    with _naming_the_previous(folder):
        architecture, config, model = read_model_file(folder / MODEL_FILE)
        _, _, ema = read_model_file(folder / EMA_FILE)
        optimizer, _ = read_tensors(folder / OPTIMIZER_FILE)
        for name, tensors in zip(TENSOR_FILES, (model, ema, optimizer), strict=True):
            refuse_not_finite(tensors, folder / name)
    return Checkpoint(folder, architecture, config, model, ema, optimizer, trainer)


def read_trainer(path: str | Path) -> dict[str, Any]:
    """The trainer's part of a checkpoint, without the weights. Errors as in :func:`load_checkpoint`.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import checkpoint_path, read_trainer, save_checkpoint
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> adam = torch.optim.AdamW(model.parameters())
        >>> path = save_checkpoint(checkpoint_path("runs/a", 10), model, model.state_dict(), adam, {"step": 10})
        >>> read_trainer(path)
        {'step': 10}
    """
    folder = find_checkpoint(path)
    with _naming_the_previous(folder):
        trainer = _read_json_object(folder / TRAINER_FILE)
        step = trainer.get("step", 0)
        if type(step) is not int or step < 0:  # bool is a kind of int in Python
            raise ValueError(f"{folder / TRAINER_FILE} has the step {step!r}; accepted: a whole number from 0")
        return trainer


def read_class_names(path: str | Path) -> list[str]:
    """The names of the classes that a checkpoint learned; empty if it does not say. Errors as in
    :func:`load_checkpoint`.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import read_class_names, save_checkpoint
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> optimizer, notes = torch.optim.AdamW(model.parameters()), {"class_names": '["cat", "dog"]'}
        >>> path = save_checkpoint("runs/a/checkpoints/step_00000010", model, model.state_dict(), optimizer, {}, notes)
        >>> read_class_names(path)
        ['cat', 'dog']
    """
    folder = find_checkpoint(path)
    with _naming_the_previous(folder):
        return class_names_in(read_file_metadata(folder / MODEL_FILE), folder)


def _read_json_object(file: Path) -> dict[str, Any]:
    try:
        value = read_json(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {str(file)!r}; it is no complete checkpoint") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(value).__name__}; accepted: an object")
    return value


@contextlib.contextmanager
def _naming_the_previous(folder: Path) -> Iterator[None]:
    """Add to an error about a damaged checkpoint which earlier one of the run can be resumed."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        run = folder.absolute().parents[1]
        earlier = (other for other in reversed(list_checkpoints(run)) if other.name < folder.name)
        previous = next(filter(_is_sound, earlier), None)
        if previous is None:
            raise
        raise type(error)(f"{error}; the checkpoint before it can be resumed: --resume {previous}") from None


_known: dict[tuple[Path, float, int], bool] = {}
"""Which files were found finite or not, so that no file is read twice for this: path, time of change and size."""


def _is_sound(folder: Path) -> bool:
    """Whether a run can go on from a checkpoint: every file can be read, and every tensor is finite."""
    try:
        _read_json_object(folder / TRAINER_FILE)
        return all(_is_finite(folder / name) for name in TENSOR_FILES)
    except (ValueError, OSError):
        return False


def _is_finite(file: Path) -> bool:
    key = _state_of(file)
    if key not in _known:
        _known[key] = holds_finite(file)
    return _known[key]


def _state_of(file: Path) -> tuple[Path, float, int]:
    status = file.stat()
    return file.absolute(), status.st_mtime, status.st_size


def keep_newest(newest: Path, count: int | None) -> None:
    """Delete all but the last ``count`` of a run's checkpoints up to ``newest`` (None: delete none).

    Checkpoints after ``newest`` stay and do not count. A run that was resumed from an earlier checkpoint has them; it
    replaces them when it gets there. A link stays, and so does a folder with files that are not of this package.
    Checkpoints that are damaged or not finite do not count either, so that they never take the place of one that a run
    can go on from.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import checkpoint_path, keep_newest, list_checkpoints, save_checkpoint
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> adam = torch.optim.AdamW(model.parameters())
        >>> for step in (10, 20, 30):
        ...     path = save_checkpoint(checkpoint_path("runs/a", step), model, model.state_dict(), adam, {"step": step})
        >>> keep_newest(path, 2)
        >>> [found.name for found in list_checkpoints("runs/a")]
        ['step_00000020', 'step_00000030']
    """
    if count is None:
        return
    folders = [folder for folder in list_checkpoints(newest.parents[1]) if folder.name <= newest.name]
    kept = list(itertools.islice(filter(_is_sound, reversed(folders)), count))
    for folder in folders[: folders.index(kept[-1])] if len(kept) == count else ():
        if not folder.is_symlink() and is_checkpoint(folder):
            remove_folder(folder)
            logger.info("deleted %s: the run keeps %d checkpoints", folder, count)
