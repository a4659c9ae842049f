"""The warm-up of an upcycled DC-DiT: a loss between the outputs of its blocks and those of the static DiT.

The paper (arXiv 2603.06351, v1) says: MSE between the block outputs of the student and of the frozen pretrained DiT,
for 5K steps. It does not say how the two sets of tokens are compared. Here:

- The student runs on its own tokens, as always. So the loss teaches the encoder to make tokens that the pretrained
  blocks can use, and it teaches the blocks to work on the kept tokens alone.
- A kept token at grid cell (r, c) is compared with the teacher's token of the patch that covers (r, c). If one token
  per patch is kept, the two sets correspond one to one, and equal inputs give loss zero.
- The teacher gets the same noisy images and the same conditioning, including dropped labels.
- The mean squared error of a block over the kept tokens of an image is divided by the mean square of the teacher's
  tokens of that image. The residual stream grows with depth, so without this the last blocks would dominate the loss.
  The scale is per image, so the loss of a batch does not depend on how the batch is split.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor

from dcdit import checkpoint
from dcdit.checkpoint.pretrained import load_static_dit, read_objective
from dcdit.config import TrainConfig
from dcdit.models import DCDiT, DiT, DyDiT, SparseDiT, count_flops
from dcdit.models.dc_dit import BlockStates
from dcdit.models.upcycle import freeze_embedders, upcycle
from dcdit.ops import TokenSelection

logger = logging.getLogger(__name__)


class Teacher:
    """The static DiT that an upcycled model was made from.

    Args:
        dit: the model; it is put into evaluation mode and frozen.
    """

    def __init__(self, dit: DiT) -> None:
        self.dit = dit.eval().requires_grad_(False)
        self.flops = count_flops(dit.config)["total"]
        """FLOPs of a forward pass, per image."""
        device = dit.get_buffer("pos_embed").device
        self._patch_of_cell = patch_of_cell(dit.config.grid, dit.config.patch_size).to(device)

    def loss(self, x: Tensor, states: BlockStates, sel: TokenSelection) -> Tensor:
        """Relative squared error of the student's block outputs, averaged over images and blocks.

        Args:
            x: (B, C, H, W) the noisy images that the student saw.
            states: of the student's forward pass.
            sel: the student's kept tokens, without padding (no capacity).

        Returns:
            () float32: 0 if all outputs agree, about 1 if the student's are zero. Differentiable in the outputs.
        """
        image, patch = self.matched(sel)
        errors = []
        for theirs, ours in zip(block_outputs(self.dit, x, states.cond.detach()), states.outputs, strict=True):
            error = (ours.float() - theirs[image, patch].float()).square().mean(1)
            scale = sel.lengths * theirs.float().square().mean((1, 2))
            errors.append((error / scale[image]).sum() / x.shape[0])
        return torch.stack(errors).mean()

    def matched(self, sel: TokenSelection) -> tuple[Tensor, Tensor]:
        """For each kept token (T,): its image, and the teacher's token of the patch that covers its grid cell."""
        cells = self._patch_of_cell.shape[0]
        return sel.indices // cells, self._patch_of_cell[sel.indices % cells]


def begin_upcycling(config: TrainConfig, model: checkpoint.Model, resume: str | Path | None) -> Teacher | None:
    """Make the model of a run an upcycled one, if the configuration names a source.

    The embedders of a DC-DiT are frozen. A new run gets the weights of the source. A resumed run has its own weights,
    and reads the source only if there are distillation steps left. A DyDiT and a SparseDiT have no distillation: they
    take all weights of the source, and a DyDiT starts as the source with every gate open.

    Returns:
        The teacher of the distillation steps that are left, or None if none are.

    Raises:
        ValueError, FileNotFoundError: the source is missing, or does not fit the model and the configuration.
    """
    section = config.upcycle
    if section.source is None:
        return None
    if not isinstance(model, DCDiT | DyDiT | SparseDiT):
        raise ValueError(
            f"model.name is {config.model.name!r} with upcycle.source; accepted: a DC-DiT, a DyDiT or a SparseDiT"
        )
    distill_steps = section.distill_steps if isinstance(model, DCDiT) else 0
    if isinstance(model, DCDiT):
        freeze_embedders(model)
    done = 0 if resume is None else checkpoint.read_trainer(resume).get("step", 0)
    if resume is not None and done >= distill_steps:
        return None
    learned = read_objective(section.source)
    if learned not in (None, config.diffusion.objective):
        raise ValueError(
            f"diffusion.objective is {config.diffusion.objective!r}; accepted: {learned!r}, that of {section.source}"
        )
    source = load_static_dit(section.source, model.config.num_heads).to(model.get_buffer("pos_embed").device)
    if resume is None:
        upcycle(model, source)
        logger.info("the run starts from the weights of %s", section.source)
    return Teacher(source) if distill_steps else None


@torch.no_grad()
def block_outputs(dit: DiT, x: Tensor, cond: Tensor) -> list[Tensor]:
    """The tokens (B, patches, D) of a static DiT after each block.

    Args:
        x: (B, C, H, W).
        cond: SiLU of the sum of its timestep and label embeddings: (B, D); (depth, B, D) with ``separate_embedders``.
    """
    tokens = dit.x_embedder(x.to(dit.x_embedder.weight.dtype)).flatten(2).transpose(1, 2) + dit.pos_embed
    outputs = []
    for block, mod in zip(dit.blocks, dit.modulation(cond), strict=True):
        tokens = block(tokens, mod)
        outputs.append(tokens)
    return outputs


def patch_of_cell(grid: tuple[int, int], patch_size: int) -> Tensor:
    """(H*W,) int64: the raster index of the patch that covers each cell of the grid."""
    rows, cols = (torch.arange(side, device="cpu") // patch_size for side in grid)
    return (rows[:, None] * (grid[1] // patch_size) + cols).flatten()
