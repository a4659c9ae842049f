"""Configurations of the models: frozen, validated, and plain enough to be stored as JSON in a checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from dcdit.models.starts import STARTS
from dcdit.nn.conv_block import ConvBlock
from dcdit.nn.routers import ROUTERS
from dcdit.ops.dechunk import MAX_SIGMA
from dcdit.utils.schema import check_values, from_mapping, is_size
from dcdit.utils.text import short

DECHUNKS = ("spatial", "ema")
LARGEST = {"in_channels": 65536, "hidden_size": 16384, "depth": 512, "num_heads": 4096, "num_classes": 1 << 24}
GRIDS = {"grid", "sparse_grid", "noisy_grid"}
"""Fields that hold (H, W)."""
MAX_SIDE, MAX_MLP_RATIO = 1 << 13, 64
"""Far above every published model. Without them, one number of a stranger's file takes all time and memory there is."""
NOISY_FROM = 750
"""From this timestep on a SparseDiT has its fewest tokens: in the first quarter of a sampler's steps."""

Config = TypeVar("Config", bound="_TransformerConfig")


@dataclass(frozen=True, kw_only=True)
class _TransformerConfig:
    grid: tuple[int, int]
    """(H, W) of the input."""
    in_channels: int = 4
    """Channels of the input: 4 of most latents, 3 of pixels."""
    hidden_size: int
    """Width D of the tokens."""
    depth: int
    """Transformer blocks."""
    num_heads: int
    """Attention heads of a block, a divisor of D."""
    mlp_ratio: float = 4.0
    """Width of the MLP over D."""
    num_classes: int = 1000
    class_dropout_prob: float = 0.1
    """Chance that training replaces a label by the null class ``num_classes``. At 0 there is no null class."""
    learn_sigma: bool = True
    """Whether to predict a variance for every channel, too."""
    frequency_shift: int = 0
    """Of the timestep frequencies, see :class:`dcdit.nn.TimestepEmbedder`: 0 in the original DiT, 1 in diffusers."""
    mlp_norm_eps: float = 1e-6
    """eps of the norm before the MLP: 1e-6 in the original DiT, 1e-5 in diffusers."""
    separate_embedders: bool = False
    """Whether each block has timestep and class embedders of its own, as in a DiT that diffusers trained. What is no
    block then sees the embedders of the first one."""

    def __post_init__(self) -> None:
        for name in GRIDS & vars(self).keys():
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        self.check_fields(vars(self))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; accepted: a divisor of hidden_size = {self.hidden_size}")
        if not 1 / self.hidden_size <= self.mlp_ratio <= MAX_MLP_RATIO:
            raise ValueError(
                f"mlp_ratio is {self.mlp_ratio}; accepted: a number up to {MAX_MLP_RATIO} that gives at least one unit"
            )
        if not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob is {self.class_dropout_prob}; accepted: a number in [0, 1)")
        if self.frequency_shift not in (0, 1):
            raise ValueError(f"frequency_shift is {self.frequency_shift}; accepted: 0, 1")
        if not 0 < self.mlp_norm_eps < 1:
            raise ValueError(f"mlp_norm_eps is {self.mlp_norm_eps}; accepted: a number in (0, 1)")

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def gate_shape(self) -> tuple[int, int] | None:
        """(depth, n): the gates of an image that training draws, n in each block. None where the width is fixed."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists, ready for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def check_fields(cls, values: Mapping[str, Any]) -> None:
        """Raise ValueError for the first of some values that is not accepted, whatever the other fields are."""
        values = _with_tuples(values)
        for name in sorted(GRIDS & values.keys()):
            sides = values[name]
            if name == "noisy_grid" and sides is None:
                continue
            if not isinstance(sides, tuple) or len(sides) != 2 or not all(is_size(side, MAX_SIDE) for side in sides):
                raise ValueError(f"{name} is {short(sides)}; accepted: (H, W), two positive integers up to {MAX_SIDE}")
        for name, largest in LARGEST.items():
            if name in values and not is_size(values[name], largest):
                raise ValueError(f"{name} is {short(values[name])}; accepted: a positive integer up to {largest}")
        check_values(cls, values, cls.__name__)

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: an unknown key, a missing key, or a value that is not accepted.
        """
        return from_mapping(cls, _with_tuples(values) if isinstance(values, dict) else values, cls.__name__)


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _as_tuple(value) if name in GRIDS else value for name, value in values.items()}


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class DCDiTConfig(_TransformerConfig):
    """A dynamic-token DiT on latents (``in_channels=4``) or pixels (``in_channels=3``).

    Raises:
        ValueError: a value that is not accepted.

    Example:
        >>> from dcdit.models import DCDiTConfig
        >>> config = DCDiTConfig(grid=(32, 32), hidden_size=384, depth=12, num_heads=6)
        >>> config.in_channels, config.router, config.dechunk_sigma
        (4, 'predictability', 1.0)
        >>> DCDiTConfig(grid=(32, 32), hidden_size=96, depth=12, num_heads=6)
        Traceback (most recent call last):
            ...
        ValueError: hidden_size is 96; accepted: a multiple of 128, so that ...
    """

    router: str = "predictability"
    """``"predictability"``; ``"dithered"``: how many positions each place keeps is learned, and they are evenly spaced;
    ``"cosine2d"``, ``"cosine1d"``; or ``"uniform"``: a regular quarter of the positions."""
    dechunk: str = "spatial"
    """``"spatial"`` or ``"ema"``."""
    dechunk_sigma: float = 1.0
    """Standard deviation of the spatial de-chunk's smoothing, in grid cells."""
    cell_context: bool = False
    """Whether a kept token also reads the mean of its cell of 4 x 4 positions. In the paper it does not."""
    start: str = "paper"
    """How training starts, a name in :data:`dcdit.models.starts.STARTS`. Trained weights do not depend on it."""
    adapt_conditioning: bool = False
    """Whether a LayerNorm adapts the conditioning of the encoder and the decoder. It is for upcycling, where the
    embedders are those of a pretrained DiT and frozen."""
    dynamic_width: bool = False
    """Whether gates decide by the timestep which heads and MLP groups of a block compute (DyDiT, arXiv 2410.03456)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        multiple = 4 * ConvBlock.GROUPS
        if self.hidden_size % multiple:
            raise ValueError(
                f"hidden_size is {self.hidden_size}; accepted: a multiple of {multiple}, so that the convolutions of "
                f"width hidden_size / 4 fall into {ConvBlock.GROUPS} groups"
            )
        if self.router not in ROUTERS:
            raise ValueError(f"router is {self.router!r}; accepted: {', '.join(ROUTERS)}")
        if self.dechunk not in DECHUNKS:
            raise ValueError(f"dechunk is {self.dechunk!r}; accepted: {', '.join(DECHUNKS)}")
        if self.start not in STARTS:
            raise ValueError(f"start is {self.start!r}; accepted: {', '.join(STARTS)}")
        if not 0 < self.dechunk_sigma <= MAX_SIGMA:
            raise ValueError(f"dechunk_sigma is {self.dechunk_sigma}; accepted: a number in (0, {MAX_SIGMA:g}]")
        if self.dynamic_width:
            _check_gates(self)

    @property
    def gate_shape(self) -> tuple[int, int] | None:
        return (self.depth, _width_gates(self)) if self.dynamic_width else None


@dataclass(frozen=True, kw_only=True)
class PatchConfig(_TransformerConfig):
    """A transformer whose tokens are the patches of the input."""

    patch_size: int = 2
    """Positions per side of a token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size < 1 or any(n % self.patch_size for n in self.grid):
            raise ValueError(
                f"patch_size is {self.patch_size!r}; accepted: a positive divisor of both sides of {self.grid}"
            )
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size is {self.hidden_size}; accepted: a multiple of 4 (sine-cosine positions)")

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of an image's patches."""
        return self.grid[0] // self.patch_size, self.grid[1] // self.patch_size

    @property
    def tokens(self) -> int:
        """L, patches of an image."""
        return math.prod(self.patches)


@dataclass(frozen=True, kw_only=True)
class DiTConfig(PatchConfig):
    """The static DiT (arXiv 2212.09748).

    Raises:
        ValueError: a value that is not accepted.

    Example:
        >>> from dcdit.models import DiTConfig
        >>> DiTConfig(grid=(32, 32), hidden_size=384, depth=12, num_heads=6, patch_size=4).patch_size
        4
    """


@dataclass(frozen=True, kw_only=True)
class DyDiTConfig(PatchConfig):
    """A DiT of dynamic width and tokens (DyDiT, arXiv 2410.03456). Its MLPs have as many groups as heads.

    Raises:
        ValueError: a value that is not accepted.

    Example:
        >>> from dcdit.models import DyDiTConfig
        >>> config = DyDiTConfig(grid=(4, 4), hidden_size=32, depth=2, num_heads=4)
        >>> config.gate_shape  # in each of 2 blocks 3 heads, 3 MLP groups, 4 tokens
        (2, 10)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gates(self)

    @property
    def gate_shape(self) -> tuple[int, int] | None:
        return self.depth, _width_gates(self) + self.tokens


def _width_gates(config: _TransformerConfig) -> int:
    """Of a block: heads and as many MLP groups, of each all but the first."""
    return 2 * (config.num_heads - 1)


def _check_gates(config: _TransformerConfig) -> None:
    hidden = int(config.hidden_size * config.mlp_ratio)
    if config.num_heads < 2:
        raise ValueError(f"num_heads is {config.num_heads}; accepted with dynamic width: at least 2")
    if hidden % config.num_heads:
        raise ValueError(
            f"mlp_ratio is {config.mlp_ratio}; accepted with dynamic width: one whose {hidden} hidden units fall into "
            f"num_heads = {config.num_heads} groups"
        )


@dataclass(frozen=True, kw_only=True)
class SparseDiTConfig(PatchConfig):
    """A DiT with few tokens in the middle (SparseDiT, arXiv 2412.06028).

    Its blocks are ``pooled`` ones, ``modules`` times (a merging block, ``sparse_depth`` sparse blocks, a recovering
    block, a dense block), and dense blocks up to ``depth``.

    Raises:
        ValueError: a value that is not accepted.

    Example:
        >>> from dcdit.models import SparseDiTConfig
        >>> sizes = {"grid": (8, 8), "hidden_size": 32, "num_heads": 4}
        >>> config = SparseDiTConfig(depth=6, modules=1, sparse_depth=2, sparse_grid=(2, 2), **sizes)
        >>> config.kinds
        ['pooled', 'merge', 'sparse', 'sparse', 'recover', 'dense']
    """

    pooled: int = 1
    """First blocks, in which attention is a mean of all tokens."""
    modules: int = 4
    """How often the tokens become few and all again."""
    sparse_depth: int = 3
    """Sparse blocks of a module, between its merging and its recovering block."""
    sparse_grid: tuple[int, int] = (8, 8)
    """(h, w) of the sparse tokens; with a router, their number is h * w."""
    noisy_grid: tuple[int, int] | None = None
    """(h, w) of the sparse tokens from timestep 750 to 1000 (noise). Below, each side grows linearly, up to that of
    ``sparse_grid`` at 0. null: they are as many at all timesteps."""
    router: str | None = None
    """``"predictability"``, ``"dithered"``, ``"cosine2d"``, ``"cosine1d"`` or ``"uniform"``: what chooses the sparse
    tokens. null: they are pooled."""
    dechunk_sigma: float = 1.0
    """With a router, standard deviation of the smoothing that brings all tokens back, in tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("pooled", 0), ("modules", 1), ("sparse_depth", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: at least {least}")
        if self.tail < 0:
            raise ValueError(
                f"depth is {self.depth}; accepted: at least {self.depth - self.tail}, the blocks of pooled = "
                f"{self.pooled} and of modules = {self.modules} with sparse_depth = {self.sparse_depth}"
            )
        for name, few, many in (
            ("sparse_grid", self.sparse_grid, self.patches),
            ("noisy_grid", self.noisy_grid or (1, 1), self.sparse_grid),
        ):
            if any(a > b for a, b in zip(few, many, strict=True)):
                raise ValueError(f"{name} is {few}; accepted: at most {many}")
        if self.router is not None and self.router not in ROUTERS:
            raise ValueError(f"router is {self.router!r}; accepted: {', '.join(ROUTERS)}, or null")
        if self.router in ("predictability", "dithered") and self.hidden_size % 32:
            raise ValueError(f"hidden_size is {self.hidden_size}; accepted with that router: a multiple of 32")
        if not 0 < self.dechunk_sigma <= MAX_SIGMA:
            raise ValueError(f"dechunk_sigma is {self.dechunk_sigma}; accepted: a number in (0, {MAX_SIGMA:g}]")

    @property
    def tail(self) -> int:
        """Dense blocks behind the last module."""
        return self.depth - self.pooled - self.modules * (1 + self.sparse_depth + 2)

    @property
    def kinds(self) -> list[str]:
        """The kind of each block: pooled, merge, sparse, recover or dense."""
        module = ["merge", *["sparse"] * self.sparse_depth, "recover", "dense"]
        return ["pooled"] * self.pooled + module * self.modules + ["dense"] * self.tail

    @property
    def most_sparse_tokens(self) -> int:
        """Of an image, at any timestep."""
        return self.sparse_grid[0] * self.sparse_grid[1]

    def sparse_tokens_at(self, t: float) -> int:
        """Of an image at a timestep, from 0 (data) to 1000 (noise)."""
        height, width = self.sparse_grid_at(t)
        return height * width

    def sparse_grid_at(self, t: float) -> tuple[int, int]:
        """(h, w) of the sparse tokens at a timestep, from 0 (data) to 1000 (noise)."""
        if self.noisy_grid is None:
            return self.sparse_grid
        noisy = min(max(t, 0.0) / NOISY_FROM, 1.0)
        height, width = (
            round(many + noisy * (few - many)) for few, many in zip(self.noisy_grid, self.sparse_grid, strict=True)
        )
        return height, width


PatchModelConfig = DiTConfig | DyDiTConfig | SparseDiTConfig
"""Of a model whose tokens are the patches of its input."""
ModelConfig = DCDiTConfig | PatchModelConfig
"""Of a model of this package."""
