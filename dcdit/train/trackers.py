"""Records sent to TensorBoard or Weights & Biases as well as to log.jsonl, through accelerate."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcdit.config import TrainConfig

if TYPE_CHECKING:
    from dcdit.utils.images import Pixels


class Trackers:
    """The trackers of ``run.trackers``. They write on the main process only, and finish when the block ends.

    The files of TensorBoard are in the folder ``dcdit`` of the run. A resumed run continues them and replaces repeated
    steps. Weights & Biases gets a new run each time, in a group with the name of the run's folder.

    Args:
        accelerator: made with ``log_with=run.trackers`` and the run's folder as ``project_dir``.
        config: of the run.
        start: steps done before this part of the run.
    """

    def __init__(self, accelerator: Any, config: TrainConfig, start: int) -> None:
        self.accelerator = accelerator
        folder = Path(config.run.out).absolute()
        options = {"tensorboard": {"purge_step": start + 1}, "wandb": {"dir": str(folder), "group": folder.name}}
        chosen = {name: options[name] for name in config.run.trackers or ()}
        accelerator.init_trackers("dcdit", _flat(config), chosen)

    def write(self, record: dict[str, Any]) -> None:
        values = {name: value for name, value in record.items() if name != "step"}
        self.accelerator.log(values, step=record["step"])

    def write_images(self, images: "dict[str, Pixels]", step: int) -> None:
        """Send pictures (H, W, 3) by their names."""
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: picture[None] for name, picture in images.items()}, step=step, **layout)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *error: object) -> None:
        # Not accelerate's end_training, which would also end the process group.
        for tracker in self.accelerator.trackers:
            tracker.finish()


def check_trackers(config: TrainConfig) -> None:
    """Raise ModuleNotFoundError for a tracker that is not installed. accelerate would silently continue without it.

    ValueError for samples that no tracker would get.
    """
    names, every = config.run.trackers, config.run.sample_every
    if every and not names:
        raise ValueError(f"run.sample_every is {every} and run.trackers names none; accepted: 0, or a tracker")
    for name in names or ():
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"run.trackers names {name}, which is not installed: pip install {name}")


def _flat(config: TrainConfig) -> dict[str, Any]:
    """``section.key`` to a number or text, which is what trackers accept."""
    sections = {section.name: getattr(config, section.name) for section in dataclasses.fields(config)}
    return {
        f"{section}.{key}": value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for section, options in sections.items()
        for key, value in dataclasses.asdict(options).items()
    }
