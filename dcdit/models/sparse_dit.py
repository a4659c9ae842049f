"""SparseDiT: a DiT whose middle blocks run on few tokens (arXiv 2412.06028, first called FlexDiT)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dcdit.models.config import SparseDiTConfig
from dcdit.models.dit import PatchTransformer
from dcdit.nn import CrossDiTBlock, DenseDiTBlock, Modulation, PooledDiTBlock, PooledTokens, RoutedTokens, stage

BLOCKS = {"pooled": PooledDiTBlock, "merge": CrossDiTBlock, "recover": CrossDiTBlock}
"""Kinds of blocks that are no :class:`dcdit.nn.DenseDiTBlock`."""


class SparseDiT(PatchTransformer):
    """A DiT with few tokens in the middle: their number is fixed, or follows the timestep.

    Pooled blocks come first, in which attention is a mean. Then come the modules. A module pools the tokens to a small
    grid, the sparse tokens. In a merging block they attend to all tokens, and sparse blocks follow. In a recovering
    block all tokens come back and attend to the sparse ones, and a dense block ends the module. Further dense blocks
    are the tail. With ``config.router``, a router chooses the sparse tokens among all in place of pooling.

    Images of a batch whose timesteps want other numbers of tokens run in groups, one for each number.

    Args:
        config: see :class:`SparseDiTConfig`.

    Example:
        >>> import torch
        >>> from dcdit.models import SparseDiT, SparseDiTConfig
        >>> sizes = {"grid": (8, 8), "hidden_size": 32, "num_heads": 4, "num_classes": 10}
        >>> model = SparseDiT(SparseDiTConfig(depth=6, modules=1, sparse_depth=2, sparse_grid=(2, 2), **sizes)).eval()
        >>> out = model(torch.randn(2, 4, 8, 8), torch.tensor([999, 0]), torch.tensor([1, 7]))
        >>> out.shape, out.abs().max().item()  # adaLN-Zero: a new model says zero
        (torch.Size([2, 8, 8, 8]), 0.0)
    """

    config: SparseDiTConfig
    sparse_tokens: nn.ModuleList

    def __init__(self, config: SparseDiTConfig) -> None:
        super().__init__(config)
        dim, router = config.hidden_size, config.router
        self.sparse_tokens = nn.ModuleList(
            PooledTokens(dim, self.patch_grid)
            if router is None
            else RoutedTokens(dim, self.patch_grid, router, config.dechunk_sigma)
            for _ in range(config.modules)
        )
        self._initialize()

    def _create_blocks(self) -> list[nn.Module]:
        config = self.config
        sizes = (config.hidden_size, config.num_heads, config.mlp_ratio, config.mlp_norm_eps)
        return [BLOCKS.get(kind, DenseDiTBlock)(*sizes) for kind in config.kinds]

    def forward(self, x: Tensor, t: Tensor, y: Tensor, return_probs: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Predict the noise (and, with ``learn_sigma``, the variance) of a batch.

        Args:
            x: (B, C, H, W), any float dtype; converted to the dtype of the weights.
            t: (B,) timesteps, integer or float. With ``config.noisy_grid`` the host reads them, which on a GPU waits
                for the device.
            y: (B,) integer labels; ``num_classes`` is the null class.
            return_probs: also return the probabilities of the routers.

        Returns:
            (B, 2C, H, W), or (B, C, H, W) without ``learn_sigma``; with ``return_probs`` a pair with the probabilities
            (B, modules, L) float32.

        Raises:
            ValueError: a shape, a label or an option that is not accepted.
        """
        if return_probs and self.config.router is None:
            raise ValueError("return_probs is True, but config.router is None: this model pools its tokens")
        tokens, cond = self.embed(x, t, y)
        with stage("transformer"):
            modulation = self.modulation(cond)
        groups = images_by_grid(self.config, t)
        if len(groups) == 1:
            (grid,) = groups
            tokens, probs = self._transform(tokens, modulation, grid)
        else:
            tokens, probs = self._transform_groups(tokens, modulation, groups)
        out = self.project(tokens, cond)
        return (out, torch.stack(probs, 1)) if return_probs else out

    def _transform(
        self, tokens: Tensor, modulation: list[Modulation], grid: tuple[int, int]
    ) -> tuple[Tensor, list[Tensor]]:
        """The blocks on images that all have this sparse grid: tokens (B, L, D), and the (B, L) of each router."""
        call, probs = self._caller(), []
        modules: Iterator[Any] = iter(self.sparse_tokens)
        for kind, block, mod in zip(self.config.kinds, self.blocks, modulation, strict=True):
            source: tuple[Tensor, ...] = ()
            if kind == "merge":
                module, full = next(modules), tokens
                tokens, chosen = module.sparsify(full, grid)
                source = (full,)
                if chosen is not None:
                    probs.append(chosen.prob)
            elif kind == "recover":
                source = (tokens,)
                tokens = module.restore(tokens, full, grid, chosen)
            with stage("transformer"):
                tokens = call(block, tokens, mod, *source)
        return tokens, probs

    def _transform_groups(
        self, tokens: Tensor, modulation: list[Modulation], groups: dict[tuple[int, int], list[int]]
    ) -> tuple[Tensor, list[Tensor]]:
        parts, order = [], torch.tensor([image for images in groups.values() for image in images], device="cpu")
        for grid, images in groups.items():
            rows = torch.tensor(images, device=tokens.device)
            own = [Modulation(*(row[rows] for row in mod)) for mod in modulation]
            parts.append(self._transform(tokens[rows], own, grid))
        back = order.argsort().to(tokens.device)
        outs, probs = zip(*parts, strict=True)
        return torch.cat(outs)[back], [torch.cat(of_module)[back] for of_module in zip(*probs, strict=True)]


def images_by_grid(config: SparseDiTConfig, t: Tensor) -> dict[tuple[int, int], list[int]]:
    """The images of a batch with timesteps t (B,), by the sparse grid that they have."""
    if config.noisy_grid is None:
        return {config.sparse_grid: list(range(len(t)))}
    groups: dict[tuple[int, int], list[int]] = {}
    for image, time in enumerate(t.tolist()):
        groups.setdefault(config.sparse_grid_at(time), []).append(image)
    return groups or {config.sparse_grid: []}
