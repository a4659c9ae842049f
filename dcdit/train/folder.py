"""The folder of a run: which it is, what it may hold before, and that one process writes there at a time."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dcdit import checkpoint as ckpt
from dcdit.config import TrainConfig, dump_yaml
from dcdit.utils.files import claimed, recover, write_text
from dcdit.utils.outputs import check_not_read
from dcdit.utils.processes import on_main_process
from dcdit.utils.reading import read_bytes

CONFIG_FILE, LOG_FILE = "config.yaml", "log.jsonl"
TAKEN = (CONFIG_FILE, LOG_FILE, "samples.npz", "sampling.json")
"""Files of a run, and of an evaluation, which a new run must not touch."""
STEP = re.compile(r"step_\d{8,}")


def placed(config: TrainConfig, resume: str | Path | None) -> TrainConfig:
    """The configuration with the folder that the run writes to: a resumed run goes on in the one that it is in.

    Raises:
        ValueError: ``resume`` is a checkpoint that is in no run.
    """
    if resume is None:
        return config
    return dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(ckpt.run_folder(resume))))


@contextlib.contextmanager
def claim_run(config: TrainConfig, resume: str | Path | None, accelerator: Any) -> Iterator[None]:
    """Hold the run's folder, cleaned up after a killed process. Every process has to call this.

    Raises:
        FolderInUseError: another run is in it.
        ValueError: it holds files that the run would replace.
    """
    with on_main_process(accelerator.is_main_process, lambda: _claimed(config, resume)):
        yield


@contextlib.contextmanager
def _claimed(config: TrainConfig, resume: str | Path | None) -> Iterator[None]:
    out = Path(config.run.out)
    with claimed(out):
        recover(out / ckpt.CHECKPOINTS)
        check_folder(config, resume)
        yield


def check_folder(config: TrainConfig, resume: str | Path | None) -> None:
    """Raise ValueError if the folder of the run holds files that the run would replace, or lies within the data.

    A run among folders of images would be one more class.
    """
    out = Path(config.run.out)
    if resume is None:
        check_not_read(out, {"data.path": config.data.path, "data.held_out_path": config.data.held_out_path})
        _check_free(out, config)
    else:
        _check_later_checkpoints(out, ckpt.find_checkpoint(resume))


def _check_free(out: Path, config: TrainConfig) -> None:
    """Refuse the folder of another run. The same run, stopped before its first checkpoint, begins again."""
    if ckpt.list_checkpoints(out):
        raise ValueError(f"{out} already holds a run; resume it (--resume {out}) or choose another --out")
    begun = _reads(out / CONFIG_FILE, dump_yaml(config))
    taken = [name for name in TAKEN if (out / name).exists() and not (begun and name in (CONFIG_FILE, LOG_FILE))]
    if (out / ckpt.CHECKPOINTS).is_dir() and any((out / ckpt.CHECKPOINTS).iterdir()):
        taken.append(f"{ckpt.CHECKPOINTS}/")
    if taken:
        raise ValueError(f"{out} already holds {', '.join(taken)}; choose another --out, or move them away")


def _check_later_checkpoints(out: Path, resumed: Path) -> None:
    """Refuse what the run could not replace, before it has spent hours on the way there."""
    for path in sorted((out / ckpt.CHECKPOINTS).iterdir()):
        if STEP.fullmatch(path.name) and path.name > resumed.name:
            if path.is_symlink():
                raise ValueError(f"{path} is a link, and the run would replace what it leads to; remove the link")
            if not ckpt.is_checkpoint(path):
                raise ValueError(f"{path} holds more than a checkpoint, and the run would replace it; move it away")


def _reads(path: Path, text: str) -> bool:
    try:
        return read_bytes(path, len(text.encode())) == text.encode()
    except (OSError, ValueError):
        return False


def write_config(out: Path, config: TrainConfig) -> None:
    """Write config.yaml."""
    write_text(out / CONFIG_FILE, dump_yaml(config))
