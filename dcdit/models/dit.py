"""The static DiT baseline (arXiv 2212.09748)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dcdit.models import init
from dcdit.models.conditioning import create_embedders, create_modulation
from dcdit.models.config import DiTConfig, PatchModelConfig
from dcdit.models.inputs import check_inputs
from dcdit.nn import (
    DenseDiTBlock,
    DenseFinalLayer,
    sincos_position,
    stage,
)
from dcdit.nn.embedding import of_first_block
from dcdit.nn.memory_format import to_tokens
from dcdit.utils.modules import dtype_of


class PatchTransformer(nn.Module):
    """The parts of a transformer on patches, dense and in plain PyTorch. A subclass initialises and runs them.

    Args:
        config: of a subclass.
    """

    pos_embed: Tensor
    objective: str | None = None
    """What trained the weights, "dit" or "flow"; None if that is not known. Sampling checks its method against it."""
    gradient_checkpointing: bool = False
    """Whether a backward pass computes the activations of the blocks anew, instead of keeping them."""
    _gradient_checkpointing_func = staticmethod(partial(checkpoint, use_reentrant=False))
    """Calls a block so. The names of both are those of diffusers, which sets them."""

    def __init__(self, config: PatchModelConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.hidden_size, config.patch_size
        self.patch_grid = (config.grid[0] // patch, config.grid[1] // patch)
        self.x_embedder = nn.Conv2d(config.in_channels, dim, patch, stride=patch)
        self.t_embedder, self.y_embedder = create_embedders(config)
        self.register_buffer("pos_embed", torch.empty(math.prod(self.patch_grid), dim, dtype=torch.float32))
        self.modulation = create_modulation(config)
        self.blocks = nn.ModuleList(self._create_blocks())
        self.final_layer = DenseFinalLayer(dim, patch * patch * config.out_channels, dim)

    def _create_blocks(self) -> list[nn.Module]:
        config = self.config
        sizes = (config.hidden_size, config.num_heads, config.mlp_ratio, config.mlp_norm_eps)
        return [DenseDiTBlock(*sizes) for _ in range(config.depth)]

    def reset_parameters(self) -> None:
        """Fill every parameter and buffer, those of submodules too: with the same seed, as in a new model."""
        init.reset_submodules(self)
        self._initialize()

    def _initialize(self) -> None:
        init.init_patch_embed(self.x_embedder)
        init.init_embedders(self.t_embedder, self.y_embedder)
        init.xavier(self.blocks.modules())
        init.init_output(self.modulation, self.final_layer)
        self.pos_embed.copy_(sincos_position(self.config.hidden_size, self.patch_grid))

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The patches (B, L, D) with their positions, and SiLU of the conditioning. Arguments as in ``forward``."""
        check_inputs(self.config, x, t, y)
        with stage("embed"):
            cond = nn.functional.silu(self.t_embedder(t) + self.y_embedder(y))
            # The norms of the blocks read tokens whose channels lie side by side.
            tokens = to_tokens(self.x_embedder(x.to(dtype_of(self.x_embedder)))).contiguous()
            return tokens + self.pos_embed, cond

    def _caller(self) -> Callable[..., Any]:
        """What calls the computation of a block."""
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        return self._gradient_checkpointing_func if recompute else _call

    def project(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """The final layer: what the blocks return and the conditioning -> (B, 2C, H, W)."""
        with stage("final"):
            return self.unpatchify(self.final_layer(tokens, of_first_block(cond)))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, L, P*P*C) -> (B, C, H, W). A token holds the pixels (p q) of its patch in raster order, channels last."""
        patch, rows = self.config.patch_size, self.patch_grid[0]
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=patch, q=patch)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


class DiT(PatchTransformer):
    """Every patch is a token of the transformer. Dense and in plain PyTorch, made for ``torch.compile``.

    Args:
        config: see :class:`DiTConfig`.

    Example:
        >>> import torch
        >>> from dcdit.models import DiT, DiTConfig
        >>> model = DiT(DiTConfig(grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)).eval()
        >>> out = model(torch.randn(2, 4, 4, 4), torch.tensor([500, 20]), torch.tensor([3, 7]))
        >>> out.shape, out.abs().max().item()  # adaLN-Zero: a new model says zero
        (torch.Size([2, 8, 4, 4]), 0.0)
    """

    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self._initialize()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise (and, with ``learn_sigma``, the variance) of a batch.

        Args:
            x: (B, C, H, W), any float dtype; converted to the dtype of the weights.
            t: (B,) timesteps, integer or float.
            y: (B,) integer labels; ``num_classes`` is the null class.

        Returns:
            (B, 2C, H, W), or (B, C, H, W) without ``learn_sigma``.

        Raises:
            ValueError: a shape or a label that is not accepted.
        """
        tokens, cond = self.embed(x, t, y)
        call = self._caller()
        with stage("transformer"):
            for block, mod in zip(self.blocks, self.modulation(cond), strict=True):
                tokens = call(block, tokens, mod)
        return self.project(tokens, cond)
