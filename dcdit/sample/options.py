"""What a caller chooses before images are drawn."""

from dataclasses import dataclass
from typing import Literal

from dcdit.diffusion.guidance import check_interval
from dcdit.diffusion.schedule import TRAIN_STEPS

DEFAULT_METHOD = {"dit": "ddpm", "flow": "heun"}
"""The objective that trained a model to the sampling method that fits it."""


@dataclass(frozen=True)
class Guidance:
    """What decides how many rows a model call has.

    Raises:
        ValueError: an interval that guidance does not accept.

    Example:
        >>> from dcdit.sample import Guidance
        >>> guidance = Guidance(scale=1.5, interval=(0.1, 0.7))
        >>> guidance.at(500.0), guidance.at(900.0)
        (True, False)
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    null_drop_fraction: float | None = None
    """Drop fraction of the unconditional branch; None takes that of the conditional one."""

    def __post_init__(self) -> None:
        check_interval(self.interval)

    def at(self, t: float) -> bool:
        """Whether a call at this time, 1000 to 0, computes both branches."""
        low, high = check_interval(self.interval)
        return self.scale != 1 and low <= t / TRAIN_STEPS <= high


@dataclass(frozen=True)
class CostTarget:
    """A cost per image that the drop fraction is chosen for.

    Attributes:
        cost: of the whole run.
        unit: ``TFLOPs`` or ``seconds``.
        profile: a profile.json of ``dcdit profile`` to take the seconds from. None: measure them here.
    """

    cost: float
    unit: str
    profile: str | None = None


@dataclass(frozen=True)
class SamplingOptions:
    """Everything that decides which images a checkpoint gives, and what they cost.

    At most one of ``drop_fractions``, ``drop_schedules``, ``budget`` and ``target`` is given. Without any, nothing is
    dropped.

    Attributes:
        checkpoint: a run or checkpoint folder, or a file, as :func:`dcdit.checkpoint.load_model` takes it.
        method, steps, cfg_scale, seed: see :func:`dcdit.diffusion.sample`.
        ema: take the averaged weights.
        cfg_interval: times (low, high) at which guidance acts; None is all of them.
        null_drop_fraction: drop fraction of the unconditional branch; None takes that of the conditional one.
        drop_fractions: a set of images for each.
        drop_schedules: as :func:`dcdit.diffusion.parse_drop_schedule` reads them; a set of images for each.
        budget: kept tokens per image.
        capacity: packed tokens of a model call, both branches of guidance together; "auto" plans it from what the
            router keeps.
        target: a cost to choose the drop fraction for.
        batch_size: images per forward pass.
        precision: of the weights, ``fp32`` or ``bf16``.
        vae: folder of the autoencoder that decodes latents.
        graph: draw with CUDA graphs; None where that is safe and pays, see :func:`dcdit.diffusion.sample`. It decides
            the speed and not the images.
    """

    checkpoint: str
    method: str
    ema: bool = True
    steps: int = 250
    cfg_scale: float = 1.0
    cfg_interval: tuple[float, float] | None = None
    null_drop_fraction: float | None = None
    drop_fractions: tuple[float, ...] | None = None
    drop_schedules: tuple[str, ...] | None = None
    budget: int | None = None
    capacity: int | Literal["auto"] | None = None
    target: CostTarget | None = None
    seed: int = 0
    batch_size: int = 16
    precision: str = "fp32"
    vae: str | None = None
    graph: bool | None = None

    @property
    def guidance(self) -> Guidance:
        return Guidance(self.cfg_scale, self.cfg_interval, self.null_drop_fraction)
