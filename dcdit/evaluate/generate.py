"""Many samples of a checkpoint: shared out over processes, continued after a stop, with the FLOPs that they took."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcdit.checkpoint import Model, model_file
from dcdit.diffusion import sample
from dcdit.diffusion.guidance import Fraction
from dcdit.evaluate.images import write_npz
from dcdit.sample.model_calls import ModelCalls, Record, mean_records, tflops_per_image
from dcdit.utils.files import atomically
from dcdit.utils.images import to_pixels

SAMPLES, SAMPLING, BATCHES = "samples.npz", "sampling.json", "batches"


@dataclass(frozen=True)
class Settings:
    """Everything that decides which images come out.

    Attributes:
        checkpoint: where the weights are.
        weights: a hash of them, see :func:`weights_hash`.
        num: images; image i has label i modulo the number of classes, and noise of its own.
        drop: the budget in a word, e.g. ``drop_0.3``.
        vae: decoder of latents, if any.
        cfg_interval: as in :func:`dcdit.diffusion.sample`, like the rest; ``null_drop_fraction`` is the unconditional
            branch's.
    """

    checkpoint: str
    weights: str
    num: int
    steps: int
    method: str
    drop: str
    null_drop_fraction: float | None
    budget: int | None
    cfg_scale: float
    cfg_interval: list[float] | None
    seed: int
    batch_size: int
    precision: str
    vae: str | None


@dataclass(frozen=True)
class Work:
    """What sampling took, per image.

    Attributes:
        tflops: of every model call, with guidance both branches; 2 per multiply-add, as
            :func:`dcdit.models.count_flops` counts.
        tflops_null: the part of the unconditional branch, 0 without guidance.
        kept: mean share of the positions that the conditional branch kept; None for a static model.
        calls: the same of each model call, see :meth:`dcdit.sample.model_calls.ModelCalls.records`.
    """

    tflops: float
    tflops_null: float
    kept: float | None
    calls: list[Record]

    @classmethod
    def of(cls, calls: list[Record]) -> "Work":
        null = sum(call.get("gflops_null", 0.0) for call in calls) / 1e3
        kept = [call["kept"] for call in calls if "kept" in call]
        return cls(tflops_per_image(calls), null, sum(kept) / len(kept) if kept else None, calls)


def generate(
    model: Model,
    settings: Settings,
    drop: Fraction | None,
    out: Path,
    decode: Callable[[Tensor], Tensor],
    *,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], object] = lambda: None,
) -> Work | None:
    """Draw ``settings.num`` images into ``out/samples.npz``, ADM's format.

    Every batch becomes a file as soon as it is drawn, and batches that an earlier run left are not drawn again. The
    images depend neither on the number of processes nor, but for rounding, on the batch size.

    Args:
        drop: what ``settings.drop`` says.
        decode: from samples to (B, 3, H, W) in [-1, 1].
        rank, world: which process this is, and of how many; they take turns over the missing batches.
        wait: returns when all processes have called it.

    Returns:
        What it took; None for processes other than the first, which puts the file together.

    Raises:
        ValueError: ``out`` holds images of other settings.
    """
    from tqdm import tqdm

    finished = _finished(out, settings)
    batches = range(-(-settings.num // settings.batch_size))
    missing = [] if finished else [k for k in batches if not _is_drawn(_batch_file(out, k), settings)]
    wait()  # nobody draws before everybody has looked
    about = f"sampling, process {rank + 1} of {world}"
    for k in tqdm(missing[rank::world], desc=about, unit="batch", disable=rank > 0):
        batch = _draw(model, settings, drop, k * settings.batch_size, decode, device)
        atomically(_batch_file(out, k), partial(_write, batch))
    wait()
    if rank:
        return None
    return finished or _assemble(out, settings)


def weights_hash(checkpoint: str | Path, ema: bool) -> str:
    """Of the file that :func:`dcdit.checkpoint.load_model` reads."""
    return hashlib.sha256(model_file(checkpoint, ema).read_bytes()).hexdigest()


def _draw(
    model: Model,
    settings: Settings,
    drop: Fraction | None,
    start: int,
    decode: Callable[[Tensor], Tensor],
    device: torch.device,
) -> dict[str, Any]:
    """The batch from image ``start`` on, as arrays and text."""
    stop = min(start + settings.batch_size, settings.num)
    labels = torch.arange(start, stop) % model.config.num_classes
    watched = ModelCalls(model, len(labels))
    null, interval = settings.null_drop_fraction, settings.cfg_interval
    x = sample(
        watched,
        labels.to(device),
        settings.steps,
        settings.method,
        cfg_scale=settings.cfg_scale,
        cfg_interval=None if interval is None else (interval[0], interval[1]),
        drop_fraction=drop if drop is None or null is None else (drop, null),
        budget=settings.budget,
        clip=model.config.in_channels == 3 and settings.method in ("ddpm", "ddim"),
        seed=settings.seed,
        first_index=start,
        progress=False,
    )
    return {
        "images": to_pixels(decode(x)),
        "labels": labels.numpy(),
        "calls": json.dumps(watched.records()),
        "settings": json.dumps(asdict(settings)),
    }


def _batch_file(out: Path, k: int) -> Path:
    return out / BATCHES / f"{k:06d}.npz"


def _write(batch: dict[str, Any], file: Path) -> None:
    with file.open("wb") as target:
        np.savez(target, **batch)


def _is_drawn(file: Path, settings: Settings) -> bool:
    if not file.is_file():
        return False
    with np.load(file, allow_pickle=False) as batch:
        _check(json.loads(str(batch["settings"])), settings, file)
    return True


def _check(stored: dict[str, Any], settings: Settings, where: Path) -> None:
    for name, value in asdict(settings).items():
        if stored.get(name) != value:
            raise ValueError(
                f"{where} is of other settings: {name} was {stored.get(name)!r} and is {value!r}; "
                "accepted: the same, or another --out"
            )


def _finished(out: Path, settings: Settings) -> Work | None:
    if not (out / SAMPLING).is_file() or not (out / SAMPLES).is_file():
        return None
    stored = json.loads((out / SAMPLING).read_text(encoding="utf-8"))
    _check(stored["settings"], settings, out / SAMPLING)
    return Work(**stored["work"])


def _assemble(out: Path, settings: Settings) -> Work:
    """One file from all batches, and the work they took."""
    labels: list[Any] = []
    calls: list[tuple[int, list[Record]]] = []

    def batches() -> Iterator[Any]:
        for k in range(-(-settings.num // settings.batch_size)):
            file = _batch_file(out, k)
            if not file.is_file():
                raise FileNotFoundError(f"no file {str(file)!r}; run the same command again")
            with np.load(file, allow_pickle=False) as batch:
                labels.append(batch["labels"])
                calls.append((len(labels[-1]), json.loads(str(batch["calls"]))))
                yield batch["images"]

    write_npz(out / SAMPLES, settings.num, batches(), labels)
    work = Work.of(mean_records(calls))
    record = json.dumps({"settings": asdict(settings), "work": asdict(work)}, indent=2)
    atomically(out / SAMPLING, lambda file: file.write_text(record, encoding="utf-8"))
    shutil.rmtree(out / BATCHES)
    return work
