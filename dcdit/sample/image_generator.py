"""From a checkpoint to pictures, in Python."""

import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dcdit.checkpoint import CHECKPOINTS, class_names_in
from dcdit.checkpoint.hub import local_path
from dcdit.diffusion import parse_drop_schedule
from dcdit.diffusion.guidance import Fraction
from dcdit.models import DCDiT, DiT
from dcdit.sample.classes import class_numbers
from dcdit.sample.drawing import SamplingModel, draw, load_for_sampling
from dcdit.sample.kept_share import ensure_kept_share
from dcdit.sample.options import DEFAULT_METHOD, SamplingOptions
from dcdit.utils.environment import resolve_device

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)
OUTPUTS = ("pil", "pt", "latent")
VAE = "vae"
"""Folder of the autoencoder beside the weights, as in a pipeline of diffusers."""


def load(
    source: str | os.PathLike[str],
    *,
    device: str = "auto",
    precision: str = "fp32",
    ema: bool = True,
    vae: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
    revision: str | None = None,
) -> "ImageGenerator":
    """A model that is ready to draw: ``dcdit.load("runs/a").generate(["cat", 3])``.

    Args:
        source: a run folder (its newest checkpoint is taken), a checkpoint folder, a ``.safetensors`` file of this
            package, a ``.pt`` file of the DC-DiT reference implementation, or the id ``owner/name`` of a repository of
            the Hugging Face Hub, which is fetched once.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:1``.
        precision: of the weights, ``fp32`` or ``bf16``.
        ema: of a run or checkpoint, take the averaged weights.
        vae: folder or Hub id of the diffusers ``AutoencoderKL`` that turns latents into pixels. By default the folder
            ``vae`` beside the weights or in the run, if there is one. A model of pixels needs none.
        class_names: name of every label, for files that do not hold them. Checkpoints of this package do.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        FileNotFoundError: nothing at ``source``.
        ValueError: a damaged file, weights of something else, an autoencoder that does not fit, or another number of
            names than the model has classes.
        ModuleNotFoundError: an extra is missing; the message names it.

    Example:
        >>> import torch
        >>> import dcdit
        >>> from dcdit.checkpoint import save_model
        >>> from dcdit.models import create_model
        >>> model = create_model("DC-DiT-S", grid=(4, 4), hidden_size=128, depth=1, num_heads=2, num_classes=2)
        >>> save_model("model.safetensors", model, notes={"objective": "flow"})
        >>> loaded = dcdit.load("model.safetensors", device="cpu", class_names=["cat", "dog"])
        >>> options = {"num_steps": 2, "output_type": "latent", "progress": False}
        >>> torch.equal(loaded.generate(["dog"], **options), loaded.generate([1], **options))
        True
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision is {precision!r}; accepted: fp32, bf16")
    where = resolve_device(device)
    path = local_path(source, revision)
    decoder = autoencoder_beside(path) if vae is None else local_path(vae)
    loaded = load_for_sampling(path, where, ema=ema, precision=precision, vae=decoder)
    logger.info("%s is on %s in %s, and is decoded by %s", source, where, precision, decoder or "nothing")
    return ImageGenerator(loaded, str(source), where, class_names)


class ImageGenerator:
    """Draws images with one model. :func:`dcdit.load` makes it.

    Attributes:
        model: the :class:`~dcdit.models.DCDiT`, :class:`~dcdit.models.DiT`, :class:`~dcdit.models.DyDiT` or
            :class:`~dcdit.models.SparseDiT`, in eval mode.
        class_names: name of every label; empty where nobody said them.
        device: of the model.
    """

    def __init__(
        self, loaded: SamplingModel, source: str, device: torch.device, class_names: Sequence[str] | None = None
    ) -> None:
        self.model, self._decode, notes = loaded
        self.device, self._source = device, source
        self.class_names = tuple(class_names_in(notes, source) if class_names is None else class_names)
        classes = self.model.config.num_classes
        if len(self.class_names) > classes or (class_names is not None and len(self.class_names) != classes):
            raise ValueError(
                f"{len(self.class_names)} class names for {source}; accepted: {classes}, one for each class"
            )

    def generate(
        self,
        labels: int | str | Sequence[int | str] | Tensor,
        *,
        drop_fraction: float | str | Callable[[float], float] = 0.0,
        null_drop_fraction: float | None = None,
        budget: int | None = None,
        capacity: int | Literal["auto"] | None = None,
        num_steps: int = 250,
        method: str | None = None,
        scheduler: Any = None,
        cfg_scale: float = 1.0,
        cfg_interval: tuple[float, float] | None = None,
        seed: int = 0,
        batch_size: int = 16,
        output_type: str = "pil",
        return_maps: bool = False,
        graph: bool | None = None,
        progress: bool = True,
    ) -> Any:
        """Draw one image for each label.

        The noise of an image depends only on the seed and its place in ``labels``, so the same call draws the same
        images, whatever the batch size (up to the rounding of the model).

        Args:
            labels: class names or numbers; one, or a sequence.
            drop_fraction: share of the kept tokens to drop, in [0, 1): a number, a schedule as text
                (``"linear:0.6:0.1"``), or any function of time. A model without a router takes only 0.
            null_drop_fraction: another one for the unconditional branch (Lite-CFG).
            budget: keep exactly so many tokens per image instead.
            capacity: static size of the packed buffer of a batch, see :func:`dcdit.diffusion.sample`. If it was too
                small, a warning says how many tokens were lost. "auto" first measures what the router keeps, unless
                ``model.kept_share`` says it.
            num_steps: sampling steps.
            method: see :func:`dcdit.diffusion.sample`. By default ``ddpm``, or ``heun`` for a model that was trained
                with the flow objective. One that does not fit is an error.
            scheduler: one of diffusers in place of a method, see :func:`dcdit.diffusion.sample`.
            cfg_scale: classifier-free guidance; 1 is none.
            cfg_interval: guide at these times only; 1 is noise, 0 data.
            seed: fixes the noise.
            batch_size: images per forward pass.
            output_type: ``pil`` for pictures; ``pt`` for a float32 tensor (N, 3, H, W) in [-1, 1]; ``latent`` for what
                the model makes, (N, C, h, w).
            return_maps: also return what the router saw and kept.
            graph: draw with CUDA graphs; None where that is safe and pays, see :func:`dcdit.diffusion.sample`.
            progress: show a bar for each batch, in a notebook too.

        Returns:
            A list of N ``PIL.Image.Image``, or the tensor. With ``return_maps`` a pair of that and a list of N lists of
            :class:`~dcdit.sample.BoundaryMap`, one entry for each model call;
            ``maps[0][-1].over(images[0])`` is a picture of it.

        Raises:
            ValueError, TypeError: a class or option that is not accepted.
            FloatingPointError: an image is not finite.
            ModuleNotFoundError: pictures are wanted and Pillow is missing.
        """
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type is {output_type!r}; accepted: {', '.join(OUTPUTS)}")
        if output_type == "pil":
            importlib.import_module("dcdit.utils.pillow")  # if it is missing, say so before the work
        if output_type != "latent" and self._decode is None:
            raise ValueError(
                f"{self._source} makes latents of {self.model.config.in_channels} channels; give dcdit.load the vae "
                "that decodes them, or generate with output_type='latent'"
            )
        if scheduler is not None and (method is not None or graph):
            name = "method" if method is not None else "graph"
            raise ValueError(f"{name} is given beside a scheduler, which takes its place; accepted: leave one out")
        options = SamplingOptions(
            checkpoint=self._source,
            method=DEFAULT_METHOD[self.model.objective or "dit"] if method is None else method,
            steps=num_steps,
            cfg_scale=cfg_scale,
            cfg_interval=cfg_interval,
            null_drop_fraction=null_drop_fraction,
            budget=budget,
            capacity=capacity,
            seed=seed,
            batch_size=_positive("batch_size", batch_size),
            graph=graph,
        )
        drop = self._drop(drop_fraction, options, return_maps)
        classes = torch.tensor(self.labels(labels), dtype=torch.int64, device=self.device)
        ensure_kept_share(self.model, options, classes, progress)
        drawn = draw(self.model, options, classes, drop, maps=return_maps, progress=progress, scheduler=scheduler)
        if drawn.overflow:
            text = f"capacity={capacity!r} was too small: {drawn.overflow} tokens, those of the lowest p, were dropped"
            warnings.warn(text, stacklevel=2)
        images = self._output(drawn.x, output_type, batch_size)
        return (images, drawn.maps) if return_maps else images

    def labels(self, classes: int | str | Sequence[int | str] | Tensor) -> list[int]:
        """Class numbers from names and numbers. ValueError or TypeError for what is neither."""
        return class_numbers(classes, self.class_names, self.model.config.num_classes, self._source)

    def __repr__(self) -> str:
        config = self.model.config
        size = " x ".join(map(str, (config.in_channels, *config.grid)))
        return (
            f"<{type(self.model).__name__} of {self._source}: {config.num_classes} classes, {size}, on {self.device}>"
        )

    def _drop(
        self, wanted: float | str | Callable[[float], float], options: SamplingOptions, maps: bool
    ) -> Fraction | None:
        """The drop fraction for the sampler; None leaves the option out."""
        asked = {
            "drop_fraction": not (isinstance(wanted, int | float) and wanted == 0),
            "budget": options.budget is not None,
            "capacity": options.capacity is not None,
            "null_drop_fraction": options.null_drop_fraction is not None,
            "return_maps": maps,
        }
        for name in ("null_drop_fraction", "cfg_interval"):
            if getattr(options, name) is not None and options.cfg_scale == 1:
                raise ValueError(f"{name} is for guidance; accepted with a cfg_scale other than 1")
        if not isinstance(self.model, DCDiT):
            for name in (name for name, given in asked.items() if given):
                kind = "static DiT" if isinstance(self.model, DiT) else type(self.model).__name__
                raise ValueError(f"{self._source} holds a {kind}, which drops no tokens; leave {name} out")
            return None
        if options.budget is not None:
            if asked["drop_fraction"] or asked["null_drop_fraction"] or asked["capacity"]:
                raise ValueError(
                    f"budget is {options.budget}, which fixes the tokens kept; leave the fractions and capacity out"
                )
            positions = math.prod(self.model.config.grid)
            if not 1 <= options.budget <= positions:
                raise ValueError(f"budget is {options.budget}; accepted: 1 to {positions}, the positions of an image")
            return None
        return parse_drop_schedule(wanted) if isinstance(wanted, str) else wanted

    def _output(self, x: Tensor, output_type: str, batch_size: int) -> "list[Image] | Tensor":
        if output_type == "latent" or self._decode is None:
            return x
        pixels = torch.cat([self._decode(batch) for batch in x.split(batch_size)])
        if output_type == "pt":
            return pixels
        from dcdit.utils.images import to_pixels
        from dcdit.utils.pillow import Image

        return [Image.fromarray(image) for image in to_pixels(pixels)]


def autoencoder_beside(path: Path) -> Path | None:
    """The folder of an autoencoder in the folder of the weights, or in the run that the checkpoint is of."""
    folder = path if path.is_dir() else path.parent
    run = [folder.parents[1]] if folder.parent.name == CHECKPOINTS else []
    return next((place / VAE for place in [folder, *run] if (place / VAE / "config.json").is_file()), None)


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; accepted: a positive integer")
    return value
