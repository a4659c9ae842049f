"""The warm-up of an upcycled DC-DiT: every block is held to the output of the same block of the static DiT.

The paper (arXiv 2603.06351, v1) says: MSE between the block outputs of the student and of the frozen pretrained DiT,
for 5K steps. It does not say how two token sets are compared. Here:

- The student runs as it always does, on its own tokens; so the loss teaches its encoder to make tokens that the
  pretrained blocks understand, and its blocks to live with the tokens that are kept.
- A kept token at cell (r, c) is compared with the teacher's token of the patch that covers (r, c): it stands for that
  region. Where one token per patch is kept, the two sets are the same, and equal inputs give loss zero.
- The teacher sees the same noisy images and the same conditioning, labels dropped in the same rows.
- A block's mean squared error over the kept tokens of an image is divided by the mean square of the teacher's tokens of
  that image: the residual stream grows with the depth, and otherwise the last blocks would be all of the loss. Image by
  image, so that the loss of a batch does not depend on how the batch is split.
"""

from pathlib import Path

import torch
from torch import Tensor

from dcdit import checkpoint
from dcdit.checkpoint.pretrained import load_static_dit, read_objective
from dcdit.config import TrainConfig
from dcdit.models import DCDiT, DiT, count_flops
from dcdit.models.dc_dit import BlockStates
from dcdit.models.upcycle import freeze_embedders, upcycle
from dcdit.ops import TokenSelection


class Teacher:
    """A frozen static DiT.

    Args:
        dit: the model that the student was made from; put into eval mode and frozen.
    """

    def __init__(self, dit: DiT) -> None:
        self.dit = dit.eval().requires_grad_(False)
        self.flops = count_flops(dit.config)["total"]
        """Of a forward pass, per image."""
        device = dit.get_buffer("pos_embed").device
        self._patch_of_cell = patch_of_cell(dit.config.grid, dit.config.patch_size).to(device)

    def loss(self, x: Tensor, states: BlockStates, sel: TokenSelection) -> Tensor:
        """Relative squared error of the student's block outputs, averaged over images and blocks.

        Args:
            x: (B, C, H, W), the noisy images that the student saw.
            states: of the student's forward pass.
            sel: the tokens that it kept, without padding (no capacity).

        Returns:
            () float32; 0 where all outputs agree, about 1 where the student's are zero. Differentiable in the outputs.
        """
        cells = self._patch_of_cell.shape[0]
        image, patch = sel.indices // cells, self._patch_of_cell[sel.indices % cells]
        errors = []
        for theirs, ours in zip(block_outputs(self.dit, x, states.cond.detach()), states.outputs, strict=True):
            error = (ours.float() - theirs[image, patch].float()).square().mean(1)
            scale = sel.lengths * theirs.float().square().mean((1, 2))
            errors.append((error / scale[image]).sum() / x.shape[0])
        return torch.stack(errors).mean()


def begin_upcycling(config: TrainConfig, model: checkpoint.Model, resume: str | Path | None) -> Teacher | None:
    """Make the model of a run an upcycled one, where the configuration names a source.

    Its embedders are frozen. A new run gets the source's weights; a resumed one has its own, and needs the source only
    as long as there is distillation left to do.

    Returns:
        The teacher of the steps to come; None if there are no such steps.

    Raises:
        ValueError, FileNotFoundError: no source there, or one that does not fit the model and the configuration.
    """
    section = config.upcycle
    if section.source is None:
        return None
    if not isinstance(model, DCDiT):
        raise ValueError(f"model.name is {config.model.name!r} with upcycle.source; accepted: a DC-DiT")
    freeze_embedders(model)
    done = 0 if resume is None else checkpoint.read_trainer(resume).get("step", 0)
    if resume is not None and done >= section.distill_steps:
        return None
    learned = read_objective(section.source)
    if learned not in (None, config.diffusion.objective):
        raise ValueError(
            f"diffusion.objective is {config.diffusion.objective!r}; accepted: {learned!r}, that of {section.source}"
        )
    source = load_static_dit(section.source, model.config.num_heads).to(model.get_buffer("pos_embed").device)
    if resume is None:
        upcycle(model, source)
    return Teacher(source) if section.distill_steps else None


@torch.no_grad()
def block_outputs(dit: DiT, x: Tensor, cond: Tensor) -> list[Tensor]:
    """The tokens (B, patches, D) of a static DiT after each block.

    Args:
        x: (B, C, H, W).
        cond: (B, D), SiLU of the sum of its embeddings.
    """
    tokens = dit.x_embedder(x.to(dit.x_embedder.weight.dtype)).flatten(2).transpose(1, 2) + dit.pos_embed
    outputs = []
    for block, mod in zip(dit.blocks, dit.modulation(cond), strict=True):
        tokens = block(tokens, mod)
        outputs.append(tokens)
    return outputs


def patch_of_cell(grid: tuple[int, int], patch_size: int) -> Tensor:
    """(H*W,) int64: the raster index of the patch that covers each cell of the grid."""
    rows, cols = (torch.arange(side) // patch_size for side in grid)
    return (rows[:, None] * (grid[1] // patch_size) + cols).flatten()
