"""Many samples of a checkpoint: drawn by several processes, continued after a stop, with the FLOPs that they took."""

import contextlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dcdit.checkpoint import Model, model_file
from dcdit.data.archives import UnreadableArchive, open_npz
from dcdit.diffusion.guidance import Fraction
from dcdit.evaluate.images import write_npz
from dcdit.sample.drawing import Decoder, draw
from dcdit.sample.model_calls import CallRecord, mean_records, tflops_per_image
from dcdit.sample.options import SamplingOptions
from dcdit.sample.sampled import ready_to_sample
from dcdit.utils.files import atomically, recover, write_text
from dcdit.utils.images import to_pixels
from dcdit.utils.reading import JSON_BYTES, parse_json, read_bytes, sha256
from dcdit.utils.schema import check_types, from_mapping
from dcdit.utils.text import one_line

logger = logging.getLogger(__name__)
SAMPLES, SAMPLING, BATCHES = "samples.npz", "sampling.json", "batches"


@dataclass(frozen=True)
class SampleSettings:
    """What identifies a set of samples on disk: equal settings give equal images.

    Attributes:
        options: of the sampling.
        weights: a hash of the checkpoint's weights, see :func:`weights_hash`.
        num: images; image i has label i modulo the number of classes, and noise of its own.
        drop: name of the budget, e.g. ``drop_0.3``.
    """

    options: SamplingOptions
    weights: str
    num: int
    drop: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values as the files hold them. A change of a name or of its form makes older samples unusable."""
        options = self.options
        return {
            "checkpoint": options.checkpoint,
            "weights": self.weights,
            "num": self.num,
            "steps": options.steps,
            "method": options.method,
            "drop": self.drop,
            "null_drop_fraction": options.null_drop_fraction,
            "budget": options.budget,
            "capacity": options.capacity,
            "cfg_scale": options.cfg_scale,
            "cfg_interval": None if options.cfg_interval is None else list(options.cfg_interval),
            "seed": options.seed,
            "batch_size": options.batch_size,
            "precision": options.precision,
            "vae": options.vae,
            "noise": "philox",
        }


@dataclass(frozen=True)
class SamplingCost:
    """What sampling took, per image.

    Attributes:
        tflops: of every model call, with guidance both branches; 2 per multiply-add, as
            :func:`dcdit.models.count_flops` counts.
        tflops_null: the part of the unconditional branch, 0 without guidance.
        kept: mean fraction of the positions that the conditional branch kept; None for a static model.
        overflow: tokens that a capacity dropped, over all calls of both branches; None without one.
        calls: the same of each model call, see :meth:`dcdit.sample.model_calls.ModelCalls.records`.
    """

    tflops: float
    tflops_null: float
    kept: float | None
    calls: list[CallRecord]
    overflow: float | None = None

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def of(cls, calls: list[CallRecord]) -> "SamplingCost":
        null = sum(call.get("gflops_null", 0.0) for call in calls) / 1e3
        kept = [call["kept"] for call in calls if "kept" in call]
        lost = [call["overflow"] for call in calls if "overflow" in call]
        return cls(
            tflops_per_image(calls), null, sum(kept) / len(kept) if kept else None, calls, sum(lost) if lost else None
        )


def generate(
    model: Model,
    settings: SampleSettings,
    drop: Fraction | None,
    out: Path,
    decode: Decoder,
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], object] = lambda: None,
) -> SamplingCost | None:
    """Draw ``settings.num`` images into ``out/samples.npz``, ADM's format.

    Every batch becomes a file as soon as it is drawn. Batches that an earlier run left are not drawn again. The images
    do not depend on the number of processes, nor on the batch size except for rounding and for what a capacity drops.

    Args:
        drop: the budget that ``settings.drop`` names.
        decode: of the model's samples.
        device: of the model.
        rank, world: number of this process, and how many there are; they take turns over the missing batches.
        wait: returns when all processes have called it.

    Returns:
        What it took. None for all processes but the first, which puts the file together.

    Raises:
        ValueError: ``out`` holds images of other settings, or files of the same names that are not of this function.
        FileNotFoundError: another process left a batch out.
    """
    from tqdm import tqdm

    finished = _finished(out, settings)
    batch_size = settings.options.batch_size
    files = [] if finished else _batch_files(out, settings)
    missing = [k for k, file in enumerate(files) if not _is_drawn(file, settings)]
    wait()  # all processes look before any of them draws
    logger.info("%s: %d of %d batches are there already", out, len(files) - len(missing), len(files))
    title = f"sampling, process {rank + 1} of {world}"
    sampled = ready_to_sample(model, settings.options)
    for k in tqdm(missing[rank::world], desc=title, unit="batch", disable=rank > 0):
        numbers = torch.arange(k * batch_size, min((k + 1) * batch_size, settings.num), device="cpu")
        labels = numbers % model.config.num_classes
        drawn = draw(
            model,
            settings.options,
            labels.to(device),
            drop,
            first_index=k * batch_size,
            progress=False,
            sampled=sampled,
        )
        batch = {
            "images": to_pixels(decode(drawn.x)),
            "labels": labels.numpy(),
            "calls": json.dumps(drawn.calls),
            "settings": json.dumps(settings.to_dict()),
        }
        atomically(files[k], partial(_write, batch))
    wait()
    if rank:
        return None
    cost = finished or _assemble(out, settings)
    _remove_batches(out, settings)
    return cost


def weights_hash(checkpoint: str | Path, ema: bool) -> str:
    """SHA-256 of the file that :func:`dcdit.checkpoint.load_model` reads."""
    return sha256(model_file(checkpoint, ema))


def _batch_files(out: Path, settings: SampleSettings) -> list[Path]:
    count = -(-settings.num // settings.options.batch_size)
    return [out / BATCHES / f"{k:06d}.npz" for k in range(count)]


def _write(batch: dict[str, Any], file: Path) -> None:
    with file.open("wb") as target:
        np.savez(target, **batch)


def _read(file: Path, name: str) -> Any:
    """One array of a batch file. ValueError if the file is no such thing."""
    try:
        with open_npz(file) as batch:
            value = batch.read(name)
        return value if name in ("images", "labels") else parse_json(str(value), name)
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, UnreadableArchive) else one_line(error)
        raise ValueError(f"{file} is no batch of dcdit evaluate ({reason}); accepted: another --out") from None


def _is_drawn(file: Path, settings: SampleSettings) -> bool:
    if not os.path.lexists(file):
        return False
    stored = _read(file, "settings")
    _check(stored if isinstance(stored, dict) else {}, settings, file)
    return True


def _check(stored: dict[str, Any], settings: SampleSettings, where: Path) -> None:
    for name, value in settings.to_dict().items():
        if stored.get(name) != value:
            raise ValueError(
                f"{where} is of other settings: {name} was {stored.get(name)!r} and is {value!r}; "
                "accepted: the same, or another --out"
            )


def _finished(out: Path, settings: SampleSettings) -> SamplingCost | None:
    """What the finished images of the folder took; None if there are none."""
    record = out / SAMPLING
    if not os.path.lexists(record):
        if (out / SAMPLES).exists():
            raise ValueError(f"{out / SAMPLES} is there without {SAMPLING} and would be replaced; choose another --out")
        return None
    try:
        stored = parse_json(read_bytes(record, JSON_BYTES), "it")
        parts = stored if isinstance(stored, dict) else {}
        earlier, cost = parts.get("settings"), from_mapping(SamplingCost, parts.get("work"), "work")
        if not isinstance(earlier, dict):
            raise ValueError("it has no settings")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise ValueError(f"{record} is not of dcdit evaluate ({reason}); choose another --out") from None
    _check(earlier, settings, record)
    return cost if (out / SAMPLES).exists() else None


def _assemble(out: Path, settings: SampleSettings) -> SamplingCost:
    """Make one file of all batches; returns what they took."""
    files = _batch_files(out, settings)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no file {str(file)!r}; run the same command again")
    labels = [_read(file, "labels") for file in files]
    calls = [(len(part), _read(file, "calls")) for part, file in zip(labels, files, strict=True)]
    cost = SamplingCost.of(mean_records(calls))
    # The record comes first: images without it are somebody else's.
    contents = {"settings": settings.to_dict(), "work": asdict(cost)}
    write_text(out / SAMPLING, json.dumps(contents, indent=2))
    write_npz(out / SAMPLES, settings.num, (_read(file, "images") for file in files), labels)
    return cost


def _remove_batches(out: Path, settings: SampleSettings) -> None:
    """Delete the batches, which are in the finished file, and their folder if nothing else is in it."""
    for file in _batch_files(out, settings):
        with contextlib.suppress(ValueError):  # a file of the user, or of other settings
            if _is_drawn(file, settings):
                file.unlink()
    for folder in (out, out / BATCHES):
        recover(folder)
    with contextlib.suppress(OSError):  # it holds files of the user, is a link, or is gone
        (out / BATCHES).rmdir()
