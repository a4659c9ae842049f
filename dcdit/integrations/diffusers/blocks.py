"""Our models as chains of blocks from grid to grid, which is what the caches of diffusers work on.

A cache leaves out blocks and adds what they added before: their output minus their input. So what enters the first
block and what leaves the last must have one shape in all steps. The packed blocks of a DC-DiT have none, because the
number of kept tokens changes. Its chain is the blocks of the encoder, the router with all that runs on the kept tokens
as a single block, and the blocks of the decoder.

The blocks here own no weights. They look the layers up in the model at every call, so that whatever replaces one of
those (an adapter, a hook) is seen. All blocks of a chain get the same arguments beside their input.
"""

from typing import Any, NamedTuple

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import Tensor, nn

from dcdit.checkpoint import Model
from dcdit.models import DCDiT, DiT, DyDiT, SparseDiT
from dcdit.models.dc_dit import Embedded, Prepared
from dcdit.nn import stage
from dcdit.nn.dit_block import modulate
from dcdit.nn.memory_format import to_grid, to_tokens
from dcdit.nn.modulation import Modulation


class Step(NamedTuple):
    """What all blocks of a DC-DiT's forward pass read beside their input."""

    cond: Tensor
    """(B, D): SiLU of the conditioning; (depth, B, D) with ``separate_embedders``."""
    conv_cond: Tensor
    """(B, D): the same for encoder and decoder."""
    time: Tensor
    """(B, D): embedding of the timestep."""
    drop_fraction: float | Tensor
    budget: int | None
    capacity: int | None


class _View(nn.Module):
    """A part of a model, of which it owns nothing."""

    def __init__(self, model: nn.Module, index: int = 0) -> None:
        super().__init__()
        self._model = (model,)  # a tuple hides the module from PyTorch: its weights have their place already
        self.index = index

    @property
    def model(self) -> Any:
        return self._model[0]


class EncoderBlock(_View):
    """A block of the encoder; the last one ends with its norm."""

    part = "encoder"

    def forward(self, hidden_states: Tensor, step: Step) -> Tensor:
        """Tokens (B, L, D_in) -> (B, L, D_out)."""
        stack = getattr(self.model, self.part)
        with stage(self.part):
            x = stack.blocks[self.index](to_grid(hidden_states, self.model.config.grid), step.conv_cond)
            tokens = to_tokens(x)
            return stack.norm(tokens) if self.index == len(stack.blocks) - 1 else tokens

    def modulated_input(self, hidden_states: Tensor, step: Step) -> Tensor:
        """What the block sees of its input and the conditioning: (B, C, H, W), the sum of the two in its middle."""
        block = getattr(self.model, self.part).blocks[self.index]
        h = block.conv1(block.norm1(to_grid(hidden_states, self.model.config.grid)))
        return h + block.cond_proj(step.conv_cond).to(h.dtype)[:, :, None, None]


class DecoderBlock(EncoderBlock):
    """A block of the decoder; the last one ends with its norm."""

    part = "decoder"


class InnerBlock(_View):
    """Router, selection, transformer over the kept tokens, de-chunk and residual: all between encoder and decoder."""

    def forward(self, hidden_states: Tensor, step: Step) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        model: DCDiT = self.model
        encoded = model.route(Embedded(step.cond, step.conv_cond, hidden_states, step.time))
        prepared: list[Prepared] = []
        packed, sel = model.chunk(
            hidden_states, encoded.prob, model.pos_embed, step.drop_fraction, step.budget, step.capacity,
            meanwhile=lambda: prepared.append(model.prepare(encoded)),
        )  # fmt: skip
        return model.transform_and_dechunk(encoded, prepared[0], packed, sel, step.capacity is not None)


class StaticBlock(_View):
    """A transformer block of a static DiT."""

    def forward(self, hidden_states: Tensor, modulation: list[Modulation]) -> Tensor:
        """(B, L, D) and the modulation of all blocks -> (B, L, D)."""
        with stage("transformer"):
            return self.model.blocks[self.index](hidden_states, modulation[self.index])

    def modulated_input(self, hidden_states: Tensor, modulation: list[Modulation]) -> Tensor:
        """(B, L, D): the input of the attention, as TeaCache compares it (arXiv 2411.19108)."""
        mod = modulation[self.index]
        return modulate(hidden_states, mod.attn_shift[:, None], mod.attn_scale[:, None])


class OutputLayer(_View):
    """The final layer."""

    def forward(self, hidden_states: Tensor, cond: Tensor) -> Tensor:
        """What the last block returns -> (B, 2C, H, W)."""
        return self.model.project(hidden_states, cond)


def chain(model: Model) -> nn.ModuleList:
    """The blocks of a model from grid to grid, in order."""
    assert not isinstance(model, DyDiT | SparseDiT), "there is no model of diffusers for it"
    if isinstance(model, DiT):
        return nn.ModuleList(StaticBlock(model, index) for index in range(len(model.blocks)))
    encoder = [EncoderBlock(model, index) for index in range(len(model.encoder.blocks))]
    decoder = [DecoderBlock(model, index) for index in range(len(model.decoder.blocks))]
    return nn.ModuleList([*encoder, InnerBlock(model), *decoder])


for _block in (EncoderBlock, DecoderBlock, InnerBlock, StaticBlock):
    # The blocks return their hidden states and nothing else.
    TransformerBlockRegistry.register(_block, TransformerBlockMetadata(return_hidden_states_index=0))
