"""From class labels to images, as a pipeline of diffusers."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dcdit.checkpoint import Model, class_names_in, load_model, model_file, read_metadata
from dcdit.checkpoint.card import CARD_FILE, model_card
from dcdit.checkpoint.hub import local_path
from dcdit.data.autoencoder import load_autoencoder, shift_and_scale
from dcdit.diffusion import guided, parse_drop_schedule
from dcdit.diffusion.guidance import Fraction
from dcdit.diffusion.schedulers import SchedulerRun
from dcdit.integrations.diffusers.denoiser import Denoiser
from dcdit.integrations.diffusers.transformer import (
    DCDiTTransformer2DModel,
    StaticDiTTransformer2DModel,
    Transformer2DModel,
)
from dcdit.models import DCDiT
from dcdit.sample.classes import class_numbers
from dcdit.sample.image_generator import autoencoder_beside
from dcdit.utils.files import write_text
from dcdit.utils.modules import evaluating, name_of, unwrap_model

OUTPUTS = ("pil", "np", "pt", "latent")
USE = """from dcdit.integrations.diffusers import DCDiTPipeline

pipe = DCDiTPipeline.from_pretrained("PATH")  # this folder, or its id on the Hub
images = pipe([0], guidance_scale=1.0, num_inference_steps=50).images"""
"""How a saved pipeline is used, for its model card."""


class DCDiTPipeline(DiffusionPipeline):
    """Draws images of classes. Everything that pipelines of diffusers do with their parts works here.

    Args:
        transformer: a :class:`DCDiTTransformer2DModel`, or the static :class:`StaticDiTTransformer2DModel`.
        scheduler: of diffusers: any that fits the objective of the transformer (checked when it draws).
        vae: the ``AutoencoderKL`` of a model of latents; a model of pixels has none.

    Raises:
        ValueError: a transformer of another class, or an autoencoder whose latents have another number of channels.

    Example:
        >>> import torch
        >>> from dcdit.integrations.diffusers import DCDiTPipeline
        >>> from dcdit.models import create_model
        >>> model = create_model("DC-DiT-S", grid=(4, 4), hidden_size=128, depth=1, num_heads=2, num_classes=10).eval()
        >>> model.objective = "flow"
        >>> pipe = DCDiTPipeline.from_dcdit(model)
        >>> pipe.set_progress_bar_config(disable=True)
        >>> options = {"num_inference_steps": 2, "output_type": "latent", "budget": 4}
        >>> latents = pipe([3], generator=torch.Generator().manual_seed(0), **options).images
        >>> latents.shape, torch.equal(latents, pipe([3], generator=torch.Generator().manual_seed(0), **options).images)
        (torch.Size([1, 4, 4, 4]), True)
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(self, transformer: Transformer2DModel, scheduler: Any, vae: AutoencoderKL | None = None) -> None:
        super().__init__()
        if not isinstance(unwrap_model(transformer), Transformer2DModel):
            raise ValueError(
                f"the transformer is a {type(transformer).__name__}; accepted: {DCDiTTransformer2DModel.__name__}, "
                f"{StaticDiTTransformer2DModel.__name__}"
            )
        channels = transformer.config.in_channels
        if vae is not None and vae.config.latent_channels != channels:
            raise ValueError(
                f"the vae decodes {vae.config.latent_channels} channels, the transformer makes {channels}; accepted: a "
                "vae of the same number"
            )
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.image_processor = VaeImageProcessor()
        self._guidance_scale, self._interrupt, self._num_timesteps = 1.0, False, 0

    @classmethod
    def from_dcdit(
        cls,
        source: str | os.PathLike[str] | Model,
        *,
        ema: bool = True,
        scheduler: Any = None,
        vae: str | os.PathLike[str] | AutoencoderKL | None = None,
        revision: str | None = None,
    ) -> Self:
        """A pipeline from what :func:`dcdit.load` takes, or from a model. Weights keep their dtype.

        Args:
            source: a run folder, a checkpoint, a file, an id of the Hub, or a :class:`~dcdit.models.DCDiT` or
                :class:`~dcdit.models.DiT`.
            ema: of a run or checkpoint, take the averaged weights.
            scheduler: by default DDIM with the noise schedule of the training, or flow-match Euler for the flow
                objective.
            vae: the autoencoder or its folder; by default the folder ``vae`` beside the weights or in the run, if
                there is one.
            revision: branch, tag or commit of a Hub repository.

        Raises:
            FileNotFoundError, ValueError, ModuleNotFoundError: as :func:`dcdit.load`.
        """
        if isinstance(source, str | os.PathLike):
            path = local_path(source, revision)
            file = model_file(path, ema)  # once: a training run may write another one meanwhile
            model, notes = load_model(file, ema), read_metadata(file, ema)
            vae = autoencoder_beside(path) if vae is None else vae
        else:
            model, notes = source, {}
        if isinstance(vae, str | os.PathLike):
            vae = load_autoencoder(Path(vae), torch.device("cpu"))
        kind = DCDiTTransformer2DModel if isinstance(model, DCDiT) else StaticDiTTransformer2DModel
        chosen = default_scheduler(model) if scheduler is None else scheduler
        return cls(kind.from_dcdit(model, notes), chosen, vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        drop_fraction: Fraction | str = 0.0,
        uncond_drop_fraction: Fraction | str | None = None,
        budget: int | None = None,
        guidance_channels: int | str = 3,
        guidance_interval: tuple[float, float] | None = None,
        eta: float = 0.0,
        latents: Tensor | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw an image for each label. States are float32 whatever the dtype of the weights.

        Args:
            class_labels: class names or numbers; one, or several.
            guidance_scale: of classifier-free guidance, which is on above 1, as everywhere in diffusers. It needs a
                model with a null class. :meth:`dcdit.diffusion.sample` calls it ``cfg_scale``.
            generator: of the noise; a list has one for each image.
            num_inference_steps: steps of the scheduler.
            output_type: ``pil``, ``np`` (N, H, W, 3) or ``pt`` (N, 3, H, W) in [0, 1], or ``latent``: what the
                transformer makes, (N, C, h, w).
            return_dict: return an ``ImagePipelineOutput``, not a tuple.
            drop_fraction: share of the kept tokens to drop, in [0, 1): a number, a schedule as text
                (``"linear:0.6:0.1"``), a function of the time in [0, 1], or a tensor (N,).
            uncond_drop_fraction: another one for the unconditional branch (Lite-CFG).
            budget: keep exactly so many tokens per image instead.
            guidance_channels, guidance_interval: see :func:`dcdit.diffusion.guided`.
            eta: noise of schedulers that have it, such as DDIM.
            latents: (N, C, h, w) standard normal noise to start from.
            callback_on_step_end: called as ``callback(pipe, step, timestep, {"latents": latents})`` after each step;
                what it returns may hold other latents. It may set ``pipe._interrupt`` to end the run.
            callback_on_step_end_tensor_inputs: what the callback gets; ``latents`` is all there is.

        Returns:
            ``images``: N pictures, or an array or tensor of them.

        Raises:
            ValueError: a class or option that is not accepted, a scheduler that does not fit the objective, or latents
                that nothing decodes.
        """
        self._check_output(output_type)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        unknown = sorted(set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs))
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs holds {unknown[0]!r}; accepted: "
                f"{', '.join(self._callback_tensor_inputs)}"
            )
        self._guidance_scale, self._interrupt = guidance_scale, False
        config, device, source = self.transformer.config, self._execution_device, name_of(self.transformer)
        numbers = class_numbers(class_labels, self.class_names, config.num_classes, source)
        y = torch.tensor(numbers, dtype=torch.int64, device=device)
        run = SchedulerRun(
            self.scheduler, num_inference_steps, self.transformer.to_dcdit().objective, source, eta, generator
        )
        model = guided(
            Denoiser(self.transformer, len(y)),
            y,
            self._scale,
            config.num_classes if config.class_dropout_prob > 0 else None,
            guidance_channels,
            guidance_interval,
            **self._budget(drop_fraction, uncond_drop_fraction, budget),
        )
        x = run.start(self._noise(latents, (len(y), config.in_channels, *config.grid), generator, device))
        self._num_timesteps = len(run.times)
        with evaluating(self.transformer), self.progress_bar(total=len(run.times)) as bar:
            for number, _ in enumerate(run.times):
                if self._interrupt:
                    break
                x, _ = run.step(number, replace(model, scale=self._scale), x)
                if callback_on_step_end is not None:
                    given = dict.fromkeys(callback_on_step_end_tensor_inputs, x)
                    returned = callback_on_step_end(self, number, self.scheduler.timesteps[number], given)
                    x = returned.get("latents", x)
                bar.update()
        images = x if output_type == "latent" else self.image_processor.postprocess(self._decode(x), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the pipeline (``DiffusionPipeline.save_pretrained``), and a model card, unless there is a README.md."""
        super().save_pretrained(save_directory, *args, **kwargs)
        card = Path(save_directory) / CARD_FILE
        if not card.exists():
            write_text(card, model_card(self.transformer.to_dcdit(), self.transformer.notes, USE))

    @property
    def class_names(self) -> list[str]:
        """The name of every class, in order; empty where nobody said them."""
        return class_names_in(self.transformer.notes, name_of(self.transformer))

    @property
    def labels(self) -> dict[str, int]:
        """The number of every class by its name."""
        return {name: number for number, name in enumerate(self.class_names)}

    @property
    def guidance_scale(self) -> float:
        """That of the run. A callback may set ``_guidance_scale`` for the steps that follow."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def enable_vae_slicing(self) -> None:
        """Decode one image at a time."""
        self._needs_vae().enable_slicing()

    def disable_vae_slicing(self) -> None:
        self._needs_vae().disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode an image in tiles."""
        self._needs_vae().enable_tiling()

    def disable_vae_tiling(self) -> None:
        self._needs_vae().disable_tiling()

    @property
    def _scale(self) -> float:
        return self._guidance_scale if self.do_classifier_free_guidance else 1.0

    def _budget(self, drop: Fraction | str, uncond: Fraction | str | None, budget: int | None) -> dict[str, Any]:
        """The options of a dynamic model for :func:`dcdit.diffusion.guided`."""
        dropping = uncond is not None or not (isinstance(drop, int | float) and drop == 0)
        if not isinstance(self.transformer.to_dcdit(), DCDiT):
            if dropping or budget is not None:
                raise ValueError(
                    "the transformer is a static DiT, which drops no tokens; leave fractions and budget out"
                )
            return {}
        if budget is not None:
            if dropping:
                raise ValueError(f"budget is {budget}, which fixes the tokens kept; leave the fractions out")
            return {"budget": budget}
        if uncond is not None and not self.do_classifier_free_guidance:
            raise ValueError("uncond_drop_fraction is for guidance; accepted with a guidance_scale above 1")
        branches = [parse_drop_schedule(rho) if isinstance(rho, str) else rho for rho in (drop, uncond)]
        return {"drop_fraction": branches[0] if uncond is None else tuple(branches)}

    def _noise(
        self,
        latents: Tensor | None,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> Tensor:
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"there are {len(generator)} generators; accepted: one, or {shape[0]}, one for each image")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; accepted: {shape}")
        return latents.to(device, torch.float32)

    def _check_output(self, output_type: str) -> None:
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type is {output_type!r}; accepted: {', '.join(OUTPUTS)}")
        channels = self.transformer.config.in_channels
        if output_type != "latent" and self.vae is None and channels != 3:
            raise ValueError(
                f"the transformer makes latents of {channels} channels and there is no vae that decodes them; "
                "accepted: output_type='latent', or a pipeline with a vae"
            )

    def _decode(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), in [-1, 1] or a little beyond."""
        if self.vae is None:
            return x
        shift, scale = (
            torch.tensor(numbers, device=x.device).reshape(-1, 1, 1)
            for numbers in shift_and_scale(self.vae, self.transformer.notes, name_of(self.transformer))
        )
        return self.vae.decode((x / scale + shift).to(self.vae.dtype)).sample.float()

    def _needs_vae(self) -> AutoencoderKL:
        if self.vae is None:
            raise ValueError("the pipeline has no vae; accepted: one that draws latents and has one")
        return self.vae


def default_scheduler(model: Model) -> Any:
    """Euler for the flow objective. Else DDIM with the noise schedule of the training, clipped only for pixels."""
    if model.objective == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=model.config.in_channels == 3
    )
