"""The folders of a training run: where its checkpoints are, and which files each of them has."""

from pathlib import Path

from dcdit.checkpoint.card import CARD_FILE, is_card
from dcdit.checkpoint.model import is_written_here
from dcdit.utils.files import interrupted_replacements

MODEL_FILE = "model.safetensors"
"""File of a checkpoint with the weights."""
EMA_FILE = "ema.safetensors"
"""File of a checkpoint with the averaged weights."""
OPTIMIZER_FILE = "optimizer.safetensors"
"""File of a checkpoint with the state of the optimiser."""
TRAINER_FILE = "trainer.json"
"""File of a checkpoint with what the training loop needs to go on."""
TENSOR_FILES = (MODEL_FILE, EMA_FILE, OPTIMIZER_FILE)
CHECKPOINT_FILES = (*TENSOR_FILES, TRAINER_FILE, CARD_FILE)
CHECKPOINTS = "checkpoints"
"""Folder of a run that holds its checkpoints."""


def run_folder(path: str | Path) -> Path:
    """The run that a path names: a run itself, or the one whose ``checkpoints/`` holds this checkpoint.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a checkpoint that is in no run.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import checkpoint_path, run_folder, save_checkpoint
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> adam = torch.optim.AdamW(model.parameters())
        >>> path = save_checkpoint(checkpoint_path("runs/a", 10), model, model.state_dict(), adam, {"step": 10})
        >>> run_folder(path).as_posix(), run_folder("runs/a").as_posix()
        ('runs/a', 'runs/a')
    """
    path = Path(path)
    find_checkpoint(path)
    if list_checkpoints(path):
        return path
    # As named, before any link is followed: a checkpoint that is a link belongs to the run that has the link.
    for folder in (path, path.absolute(), path.resolve()):
        if folder.parent.name == CHECKPOINTS:
            return folder.parents[1]
    raise ValueError(f"{path} is in no run, so there is no folder to go on in; accepted: RUN, or RUN/{CHECKPOINTS}/...")


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder may be replaced or deleted as a checkpoint: all of its files are of this package.

    The files may be damaged or missing, but a folder with anything else in it, or with a link, is no checkpoint.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import checkpoint_path, is_checkpoint, save_checkpoint
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> adam = torch.optim.AdamW(model.parameters())
        >>> path = save_checkpoint(checkpoint_path("runs/a", 10), model, model.state_dict(), adam, {"step": 10})
        >>> is_checkpoint(path)
        True
        >>> _ = (path / "notes.txt").write_text("of mine")
        >>> is_checkpoint(path)
        False
    """
    if not folder.is_dir():
        return False
    files = list(folder.iterdir())
    if not all(file.name in CHECKPOINT_FILES and file.is_file() and not file.is_symlink() for file in files):
        return False
    tensors = [file for file in files if file.name in TENSOR_FILES]
    cards = [file for file in files if file.name == CARD_FILE]
    return all(map(is_written_here, tensors)) and all(map(is_card, cards)) and bool(tensors or not files)


def checkpoint_path(run: str | Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step.

    Example:
        >>> from dcdit.checkpoint import checkpoint_path
        >>> checkpoint_path("runs/a", 400).as_posix()
        'runs/a/checkpoints/step_00000400'
    """
    return Path(run) / CHECKPOINTS / f"step_{step:08d}"


def list_checkpoints(run: str | Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first.

    A process may have been killed while it replaced a checkpoint, between moving the old one away and naming the new
    one. Then the old one is listed, where it is.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import checkpoint_path, list_checkpoints, save_checkpoint
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> adam = torch.optim.AdamW(model.parameters())
        >>> for step in (10, 20):
        ...     path = save_checkpoint(checkpoint_path("runs/a", step), model, model.state_dict(), adam, {"step": step})
        >>> [found.name for found in list_checkpoints("runs/a")]
        ['step_00000010', 'step_00000020']
    """
    parent = Path(run) / CHECKPOINTS
    folders = {path.name: path for path in parent.glob("step_*")} | interrupted_replacements(parent)
    return [folder for _, folder in sorted(folders.items()) if (folder / MODEL_FILE).is_file()]


def find_checkpoint(path: str | Path) -> Path:
    """The folder itself if it is a checkpoint, else the newest under its ``checkpoints/``.

    Raises:
        FileNotFoundError: neither.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import checkpoint_path, find_checkpoint, save_checkpoint
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> adam = torch.optim.AdamW(model.parameters())
        >>> for step in (10, 20):
        ...     path = save_checkpoint(checkpoint_path("runs/a", step), model, model.state_dict(), adam, {"step": step})
        >>> find_checkpoint("runs/a").name, find_checkpoint("runs/a/checkpoints/step_00000010").name
        ('step_00000020', 'step_00000010')
    """
    path = Path(path)
    if (path / MODEL_FILE).is_file():
        return path
    found = list_checkpoints(path) or [
        old for name, old in interrupted_replacements(path.parent).items() if name == path.name
    ]
    if not found:
        raise FileNotFoundError(
            f"no checkpoint in {str(path)!r}: no {MODEL_FILE}, no checkpoints/step_*/{MODEL_FILE}{_near(path)}"
        )
    return found[-1]


def _near(path: Path) -> str:
    """What a folder without a checkpoint is after all, for the error; empty if it is nothing of ours."""
    if path.name == CHECKPOINTS and list_checkpoints(path.parent):
        return f"; accepted: its run, {path.parent}"
    if (path / "config.yaml").is_file():
        return f"; this run stopped before its first one: dcdit train --config {path / 'config.yaml'} begins it again"
    runs = sorted(child.name for child in path.iterdir() if list_checkpoints(child)) if path.is_dir() else []
    return f"; accepted: one of the runs in it, such as {path / runs[0]}" if runs else ""


def model_file(path: str | Path, ema: bool = True) -> Path:
    """The model file in a run folder or checkpoint folder; any other path is returned as it is.

    A folder without a run that holds one safetensors file, as published models do, gives that file.

    Args:
        ema: of a folder, the averaged weights.

    Raises:
        FileNotFoundError: nothing there, or a folder without a checkpoint.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import checkpoint_path, model_file, save_checkpoint
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> adam = torch.optim.AdamW(model.parameters())
        >>> path = save_checkpoint(checkpoint_path("runs/a", 10), model, model.state_dict(), adam, {"step": 10})
        >>> model_file("runs/a").name, model_file("runs/a", ema=False).name
        ('ema.safetensors', 'model.safetensors')
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"nothing at {str(path)!r}; accepted: a run or checkpoint folder, or a file of weights")
    if not path.is_dir():
        return path
    files = list(path.glob("*.safetensors"))
    if len(files) == 1 and not (path / TRAINER_FILE).exists():
        return files[0]
    return find_checkpoint(path) / (EMA_FILE if ema else MODEL_FILE)
