"""DyDiT: a DiT whose width follows the timestep, and whose MLPs skip tokens (arXiv 2410.03456)."""

import torch
from torch import Tensor, nn

from dcdit import ops
from dcdit.models.config import DyDiTConfig
from dcdit.models.dit import PatchTransformer
from dcdit.models.slices import SlicedBlocks
from dcdit.nn import DenseDiTBlock, Gates, Modulation, TokenGate, WidthGates, Widths, stage
from dcdit.nn.embedding import of_first_block
from dcdit.nn.gates import token_mask


class DyDiT(PatchTransformer):
    """A DiT with gates: heads and MLP groups by the timestep (TDW), and in each MLP the tokens that pass it (SDT).

    Called like a DiT it computes everything and masks what a gate closes, which training needs. To skip it instead, see
    :class:`dcdit.models.SlicedModel`; :func:`dcdit.load` and ``dcdit sample`` do that.

    Args:
        config: see :class:`DyDiTConfig`.

    Example:
        >>> import torch
        >>> from dcdit.models import DyDiT, DyDiTConfig
        >>> model = DyDiT(DyDiTConfig(grid=(4, 4), hidden_size=32, depth=2, num_heads=4, num_classes=10)).eval()
        >>> x, t, y = torch.randn(1, 4, 4, 4), torch.tensor([500]), torch.tensor([3])
        >>> out, gates = model(x, t, y, return_gates=True)
        >>> gates.counts().heads.tolist()  # a new model is complete: 4 heads in each of 2 blocks
        [[4, 4]]
    """

    config: DyDiTConfig
    token_gates: nn.ModuleList

    def __init__(self, config: DyDiTConfig) -> None:
        super().__init__(config)
        dim, heads = config.hidden_size, config.num_heads
        self.width_gates = WidthGates(dim, config.depth, heads, heads)
        self.token_gates = nn.ModuleList(TokenGate(dim) for _ in range(config.depth))
        self._initialize()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        complete: bool = False,
        gate_noise: Tensor | None = None,
        return_gates: bool = False,
        sliced: SlicedBlocks | None = None,
    ) -> Tensor | tuple[Tensor, Gates]:
        """Predict the noise (and, with ``learn_sigma``, the variance) of a batch.

        Args:
            x: (B, C, H, W), any float dtype; converted to the dtype of the weights.
            t: (B,) timesteps, integer or float.
            y: (B,) integer labels; ``num_classes`` is the null class.
            complete: compute everything, whatever the gates say.
            gate_noise: (B, depth, n) with the sizes of ``config.gate_shape``, from
                :func:`dcdit.nn.gates.logistic_noise`. In training mode None draws it, else there is none.
            return_gates: also return the gates.
            sliced: the blocks of this timestep, for a forward pass without gradients; made by
                :class:`dcdit.models.SlicedModel`.

        Returns:
            (B, 2C, H, W), or (B, C, H, W) without ``learn_sigma``; with ``return_gates`` a pair with :class:`Gates`.

        Raises:
            ValueError: a shape, a label or an option that is not accepted.
        """
        if complete and (return_gates or gate_noise is not None or sliced is not None):
            raise ValueError("complete is True, which uses no gates; leave gate_noise, return_gates and sliced out")
        if sliced is not None and gate_noise is not None:
            raise ValueError("sliced blocks have the width of their timestep; leave gate_noise out")
        tokens, cond = self.embed(x, t, y)
        with stage("transformer"):
            modulation = self.modulation(cond)
        if complete:
            tokens, gates = self._complete(tokens, modulation), None
        elif sliced is None:
            tokens, gates = self._masked(tokens, modulation, t, gate_noise)
        else:
            tokens, gates = self._sliced(tokens, modulation, sliced)
        out = self.project(tokens, cond)
        return (out, gates) if return_gates and gates is not None else out

    def _complete(self, tokens: Tensor, modulation: list[Modulation]) -> Tensor:
        call = self._caller()
        with stage("transformer"):
            for block, mod in zip(self.blocks, modulation, strict=True):
                tokens = call(block, tokens, mod)
        return tokens

    def _masked(
        self, tokens: Tensor, modulation: list[Modulation], t: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Gates]:
        call, masks = self._caller(), []
        width_noise, token_noise = self._split(noise, len(tokens))
        with stage("transformer"):
            gates = self.width_gates(of_first_block(self.t_embedder(t)), width_noise)
            layers = zip(self.blocks, self.token_gates, modulation, gates.of_blocks(), strict=True)
            for number, (block, token_gate, mod, widths) in enumerate(layers):
                drawn = None if token_noise is None else token_noise[:, number]
                tokens, mask = call(_masked_block, block, token_gate, tokens, mod, widths, drawn)
                masks.append(mask)
        return tokens, gates._replace(tokens=torch.stack(masks, 1))

    @torch.no_grad()
    def _sliced(self, tokens: Tensor, modulation: list[Modulation], sliced: SlicedBlocks) -> tuple[Tensor, Gates]:
        masks = []
        for block, token_gate, mod in zip(sliced.blocks, self.token_gates, modulation, strict=True):
            with stage("transformer"):
                tokens = block.attend(tokens, mod)
            masks.append(_mlp_on_some(tokens, block, token_gate, mod))
        return tokens, sliced.gates_of(len(tokens))._replace(tokens=torch.stack(masks, 1).float())

    def _split(self, noise: Tensor | None, images: int) -> tuple[Tensor | None, Tensor | None]:
        """The noise of the widths (B, depth, n) and of the tokens (B, depth, L)."""
        if noise is None:
            return None, None
        shape = (images, *(self.config.gate_shape or ()))
        if tuple(noise.shape) != shape:
            raise ValueError(f"gate_noise has shape {tuple(noise.shape)}; accepted: {shape}")
        count = noise.shape[2] - self.config.tokens
        return noise[..., :count], noise[..., count:]


def _masked_block(
    block: nn.Module, token_gate: nn.Module, tokens: Tensor, mod: Modulation, widths: Widths, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A block that masks what is closed: tokens (B, L, D), and the gates of its MLP (B, L)."""
    return block(tokens, mod, widths, lambda x: token_mask(token_gate(x, noise)))


def _mlp_on_some(tokens: Tensor, block: DenseDiTBlock, token_gate: nn.Module, mod: Modulation) -> Tensor:
    """The MLP of a block on the tokens that its gate lets pass, in place in tokens (B, L, D). Returns which (B, L)."""
    with stage("router"):
        p = token_gate(tokens)
    with stage("select"):
        sel = ops.select_tokens(p)
    with stage("gather"):
        packed = ops.gather_tokens(tokens, sel)
    with stage("transformer"):
        h = ops.modulated_layer_norm(packed, mod.mlp_shift, mod.mlp_scale, sel.cu_seqlens, block.mlp_norm_eps)
        packed = ops.gated_add(packed, block.mlp(h), mod.mlp_gate, sel.cu_seqlens)
    with stage("dechunk"):
        tokens.view(-1, tokens.shape[-1]).index_copy_(0, sel.indices, packed.to(tokens.dtype))
    return sel.mask
