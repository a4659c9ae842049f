"""Drawing images with :class:`SamplingOptions`, and what the model kept and cost at every call."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcdit.checkpoint import Model, load_model, model_file, read_metadata
from dcdit.data.autoencoder import create_decoder
from dcdit.diffusion import Step, sample
from dcdit.diffusion.guidance import Fraction
from dcdit.models import DCDiT
from dcdit.nn.memory_format import channels_last
from dcdit.sample.model_calls import BoundaryMap, CallRecord, ModelCalls, lost_tokens, mean_records
from dcdit.sample.options import SamplingOptions
from dcdit.sample.sampled import Sampled, ready_to_sample

Decoder = Callable[[Tensor], Tensor]
"""From samples (B, C, H, W) to (B, 3, h, w) in [-1, 1]."""


@dataclass(frozen=True)
class TracedImage:
    """How one image was drawn."""

    maps: list[BoundaryMap]
    """How the router saw it, one entry per model call."""
    expected: dict[float, Tensor]
    """Time of a step to the clean image (C, H, W) that the model expected there."""


@dataclass(frozen=True)
class DrawnImages:
    """Images and what they took."""

    x: Tensor
    """(N, C, H, W) on the labels' device."""
    calls: list[CallRecord]
    """One entry per model call, averaged over the images."""
    traced: list[TracedImage]
    """How the first images were drawn, as many as were asked for."""
    maps: list[list[BoundaryMap]]
    """How the router saw each image, one entry per model call, if it was asked for; else empty."""

    @property
    def overflow(self) -> int | None:
        """Tokens that the capacity dropped, over all images and calls; None where there was no capacity."""
        return lost_tokens(self.calls, len(self.x))


class SamplingModel(NamedTuple):
    """A model that is ready to draw."""

    model: Model
    decode: Decoder | None
    """Makes pixels of its samples. None for latents without an autoencoder."""
    notes: dict[str, str]
    """What its file says about itself (:func:`dcdit.checkpoint.read_metadata`)."""


def load_for_sampling(
    checkpoint: str | Path,
    device: torch.device,
    *,
    ema: bool = True,
    precision: str = "fp32",
    vae: str | Path | None = None,
) -> SamplingModel:
    """The model of a checkpoint on the device, and the decoder of its samples.

    Args: as in :class:`SamplingOptions`.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: see :func:`dcdit.checkpoint.load_model` and
            :func:`dcdit.data.autoencoder.create_decoder`.
    """
    file = model_file(checkpoint, ema)  # once: a training run may write another one meanwhile
    model = load_model(file, ema).to(device)
    if isinstance(model, DCDiT):
        channels_last(model)
    # A file may hold other dtypes, and several of them.
    model = model.bfloat16() if precision == "bf16" else model.float()
    notes = read_metadata(file, ema)
    return SamplingModel(model, create_decoder(vae, model.config.in_channels, device, notes, file), notes)


def draw(
    model: Model,
    options: SamplingOptions,
    labels: Tensor,
    drop: Fraction | None,
    *,
    first_index: int = 0,
    trace: int = 0,
    maps: bool = False,
    progress: bool = True,
    sampled: Sampled | None = None,
    scheduler: Any = None,
) -> DrawnImages:
    """Draw an image per label, in batches of ``options.batch_size``.

    Args:
        labels: (N,) integer classes on the model's device.
        drop: drop fraction of the conditional branch; None leaves the option out.
        first_index: number of the first image; the noise of an image depends on its number and the seed.
        trace: also record how so many of the first images were drawn.
        maps: also record how the router saw every image.
        progress: show a bar for each batch.
        sampled: graphs or slices of an earlier call with the same model and options; None makes them.
        scheduler: of diffusers, in place of ``options.method``. It is not captured in graphs.

    Raises:
        ValueError: graphs are asked for and cannot be.
        FloatingPointError: an image is not finite.
    """
    if scheduler is not None:
        options = replace(options, graph=False)
    sampled = ready_to_sample(model, options, scheduler) if sampled is None else sampled
    ours = {"method": options.method, "clip": clips(model, options.method), "graph": sampled.graph}
    images, records, seen, traced = [], [], [], []
    for start in range(0, len(labels), options.batch_size):
        batch = labels[start : start + options.batch_size]
        followed = min(max(trace - start, 0), len(batch))
        calls = ModelCalls(sampled.model, len(batch), maps=len(batch) if maps else followed)
        expected: dict[float, Tensor] = {}

        def note_expected(step: Step, expected: dict[float, Tensor] = expected, followed: int = followed) -> None:
            expected[step.t] = step.x0[:followed]

        with _router_errors_explained(options):
            drawn = sample(
                calls,
                batch,
                options.steps,
                cfg_scale=options.cfg_scale,
                cfg_interval=options.cfg_interval,
                drop_fraction=_both_branches(drop, options.null_drop_fraction),
                budget=options.budget,
                capacity=options.capacity,
                seed=options.seed,
                first_index=first_index + start,
                progress=progress,
                callback=note_expected if followed else None,
                **(ours if scheduler is None else {"scheduler": scheduler}),
            )
        images.append(drawn)
        records.append((len(batch), calls.records()))
        seen += [calls.maps(image) for image in range(len(batch) if maps else 0)]
        for image in range(followed):
            of_image = {t: x0[image] for t, x0 in expected.items()}
            traced.append(TracedImage(calls.maps(image), of_image))
    x = torch.cat(images)
    if not x.isfinite().all():
        raise _not_finite(options)
    return DrawnImages(x, mean_records(records), traced, seen)


def clips(model: Model, method: str) -> bool:
    """Whether a sampler clamps the clean data that the model expects: pixels have known bounds, latents have none."""
    return model.config.in_channels == 3 and method in ("ddpm", "ddim")


def class_labels(num_classes: int, chosen: Sequence[int] | None, per_class: int, num: int | None) -> Tensor:
    """Labels of the images to draw, (N,) int64.

    Args:
        num_classes: of the model.
        chosen: classes to draw; None is all of them, at most 16.
        per_class: images of each class, one class after another.
        num: images in all instead, the classes taking turns.

    Raises:
        ValueError: a class that the model does not have.
    """
    classes = chosen or list(range(min(num_classes, 16)))
    for label in classes:
        if not 0 <= label < num_classes:
            raise ValueError(f"label {label}; accepted: 0 to {num_classes - 1}")
    if num is not None:
        return torch.tensor([classes[i % len(classes)] for i in range(num)], device="cpu")
    return torch.tensor(classes, device="cpu").repeat_interleave(per_class)


@contextlib.contextmanager
def _router_errors_explained(options: SamplingOptions) -> Iterator[None]:
    """Turn the router's error about NaN, which comes before there is an image, into one that names the checkpoint."""
    try:
        yield
    except ValueError as error:
        if "NaN" not in str(error):
            raise
        raise _not_finite(options) from None


def _not_finite(options: SamplingOptions) -> FloatingPointError:
    return FloatingPointError(f"{options.checkpoint} draws numbers that are not finite in {options.precision}")


def _both_branches(drop: Fraction | None, null: float | None) -> Fraction | tuple[Fraction, Fraction] | None:
    return drop if drop is None or null is None else (drop, null)
