"""DC-DiT: a diffusion transformer that runs on the tokens that are hard to predict (arXiv 2603.06351)."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dcdit.models import init
from dcdit.models.capacity import Capacity, KeptShare, multiprocessors_of, plan_capacity
from dcdit.models.conditioning import create_embedders, create_modulation
from dcdit.models.config import DCDiTConfig
from dcdit.models.inputs import check_inputs
from dcdit.models.slices import SlicedBlocks
from dcdit.models.starts import STARTS, apply_start
from dcdit.nn import (
    ROUTERS,
    ChunkLayer,
    ContextChunkLayer,
    ConvStack,
    EMADeChunk,
    Gates,
    PackedDiTBlock,
    PackedFinalLayer,
    PendingResidual,
    RMSNorm,
    SpatialDeChunk,
    VarlenMeta,
    WidthGates,
    sincos_position,
    stage,
)
from dcdit.nn.embedding import of_first_block
from dcdit.nn.memory_format import to_grid, to_tokens
from dcdit.nn.modulation import Modulation
from dcdit.ops import TokenSelection, gated_add
from dcdit.utils.modules import dtype_of


class Routing(NamedTuple):
    """What the router decided in a forward pass.

    Example:
        >>> import torch
        >>> from dcdit.models import create_model
        >>> model = create_model("DC-DiT-S", grid=(4, 4), hidden_size=128, depth=1, num_heads=2, num_classes=10)
        >>> _, routing = model(torch.zeros(1, 4, 4, 4), torch.tensor([500]), torch.tensor([3]), return_routing=True)
        >>> routing.prob[0, [0, -1]].tolist()  # the first and the last position are always kept
        [1.0, 1.0]
        >>> torch.equal(routing.natural_mask, routing.prob > 0.5), torch.equal(routing.mask, routing.selection.mask)
        (True, True)
    """

    prob: Tensor
    """(B, L) float32, with a gradient: the ratio loss reads it."""
    mask: Tensor
    """(B, L) bool: the kept tokens."""
    natural_mask: Tensor
    """(B, L) bool: the tokens that the router alone would keep, before any dropping."""
    selection: TokenSelection
    gates: Gates | None = None
    """Of heads and MLP groups, with ``dynamic_width``."""


class BlockStates(NamedTuple):
    """What the inner transformer computed in a forward pass; distillation compares it with a teacher's."""

    cond: Tensor
    """(B, D): SiLU of the conditioning that every block saw, so with the null class where a label was dropped. With
    ``separate_embedders`` it is (depth, B, D)."""
    outputs: list[Tensor]
    """The packed tokens (T, D) after each block."""


class Embedded(NamedTuple):
    """What a forward pass knows before the encoder."""

    cond: Tensor
    """(B, D): SiLU of the conditioning; (depth, B, D) with ``separate_embedders``."""
    conv_cond: Tensor
    """(B, D): the same for encoder and decoder."""
    tokens: Tensor
    """(B, L, D/4)."""
    time: Tensor
    """(B, D): embedding of the timestep, that of the first block with ``separate_embedders``."""


class Encoded(NamedTuple):
    """What a forward pass knows before the tokens are selected."""

    cond: Tensor
    conv_cond: Tensor
    """Both as in :class:`Embedded`."""
    tokens: Tensor
    """(B, L, D): the encoder's output."""
    time: Tensor
    """As in :class:`Embedded`."""
    prob: Tensor
    """(B, L) float32: of the router."""


class Prepared(NamedTuple):
    """What the part after the selection reads beside the kept tokens."""

    modulation: list[Modulation]
    """Of each block."""
    residual: Tensor
    """(B, L, D): the encoder's output on its way around the transformer."""
    gates: Gates | None
    """Of the heads and MLP groups to mask; None where nothing is masked."""


class DCDiT(nn.Module):
    """Dynamic-token DiT: encoder, router, transformer over the kept tokens, de-chunk, decoder.

    Runs in float32, under autocast, or converted by ``.to(torch.bfloat16)``. The residual stream of the transformer has
    the dtype of the encoder's output (under autocast: the autocast dtype). Router probabilities and the de-chunk are
    always computed in float32.

    Parameters are contiguous, as ``torch.distributed.fsdp.fully_shard`` needs them. For inference on small batches,
    :func:`dcdit.nn.memory_format.channels_last` makes the model faster.

    Args:
        config: see :class:`DCDiTConfig`.

    Example:
        >>> import torch
        >>> from dcdit.models import DCDiT, DCDiTConfig
        >>> model = DCDiT(DCDiTConfig(grid=(4, 4), hidden_size=128, depth=2, num_heads=4, num_classes=10)).eval()
        >>> x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([500, 20]), torch.tensor([3, 10])  # 10 is the null class
        >>> out, routing = model(x, t, y, budget=5, return_routing=True)
        >>> out.shape, routing.mask.sum(1).tolist()
        (torch.Size([2, 8, 4, 4]), [5, 5])
    """

    objective: str | None = None
    """What trained the weights, "dit" or "flow"; None if that is not known. Sampling checks its method against it."""
    kept_share: KeptShare | None = None
    """What the router keeps of an image, as :func:`dcdit.sample.measure_kept_share` found it; None if nobody measured.
    ``capacity="auto"`` needs it."""
    gradient_checkpointing: bool = False
    """Whether a backward pass computes the activations of the transformer's blocks anew, instead of keeping them."""
    _gradient_checkpointing_func = staticmethod(partial(checkpoint, use_reentrant=False))
    """Calls a block so. The names of both are those of diffusers, which sets them."""
    pos_embed: Tensor

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, narrow = config.hidden_size, config.hidden_size // 4
        self.x_embedder = nn.Conv2d(config.in_channels, narrow, 3, padding=1)
        self.t_embedder, self.y_embedder = create_embedders(config)
        self.cond_adaptor = nn.LayerNorm(dim) if config.adapt_conditioning else None
        self.register_buffer("pos_embed", torch.empty(math.prod(config.grid), dim, dtype=torch.float32))
        self.encoder = ConvStack((narrow, narrow, dim), dim)
        self.router = ROUTERS[config.router](dim, config.grid)
        self.chunk = ContextChunkLayer(dim, config.grid) if config.cell_context else ChunkLayer()
        self.modulation = create_modulation(config)
        heads = config.num_heads
        self.width_gates = WidthGates(dim, config.depth, heads, heads) if config.dynamic_width else None
        self.blocks = nn.ModuleList(
            PackedDiTBlock(dim, config.num_heads, config.mlp_ratio, config.mlp_norm_eps) for _ in range(config.depth)
        )
        self.norm = RMSNorm(dim)
        self.residual_proj = nn.Linear(dim, dim)
        self.dechunk = (
            SpatialDeChunk(config.grid, config.dechunk_sigma) if config.dechunk == "spatial" else EMADeChunk()
        )
        self.decoder = ConvStack((dim, narrow, narrow), dim)
        self.final_layer = PackedFinalLayer(narrow, config.out_channels, dim)
        self._initialize()

    def reset_parameters(self) -> None:
        """Fill every parameter and buffer, those of submodules too: with the same seed, as in a new model.

        An upcycled model does not stay one. The weights of its source are overwritten, and the positions are counted
        in grid cells again.
        """
        init.reset_submodules(self)
        self._initialize()

    def _initialize(self) -> None:
        """Initialise as the reference does, except for what ``config.start`` says."""
        init.init_patch_embed(self.x_embedder)
        init.init_embedders(self.t_embedder, self.y_embedder)
        init.xavier(self.blocks.modules())
        for block in (*self.encoder.blocks, *self.decoder.blocks):
            init.xavier([block.cond_proj])
        init.init_output(self.modulation, self.final_layer)
        apply_start(STARTS[self.config.start], self.residual_proj, self.modulation, self.router)
        self.pos_embed.copy_(sincos_position(self.config.hidden_size, self.config.grid))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        drop_fraction: float | Tensor = 0.0,
        budget: int | None = None,
        capacity: int | Literal["auto"] | None = None,
        return_routing: bool = False,
        return_states: bool = False,
        max_seqlen: int | None = None,
        complete: bool = False,
        gate_noise: Tensor | None = None,
        sliced: SlicedBlocks | None = None,
    ) -> Tensor | tuple[Tensor, Routing] | tuple[Tensor, Routing, BlockStates]:
        """Predict the noise (and, with ``learn_sigma``, the variance) of a batch.

        Args:
            x: (B, C, H, W), any float dtype; converted to the dtype of the weights.
            t: (B,) timesteps, integer or float.
            y: (B,) integer labels; ``num_classes`` is the null class.
            drop_fraction: rho in [0, 1), one number or one per image (B,): the fraction of kept tokens to drop.
            budget: keep exactly this many tokens per image instead.
            capacity: static number of packed tokens for the whole batch (CUDA graphs); see
                :func:`dcdit.ops.select_tokens`. "auto" takes what this batch needs by ``kept_share``, with its
                max_seqlen (:meth:`plan_capacity`); the drop fraction must then be a number.
            return_routing: also return the router's decision.
            return_states: also return the router's decision and the output of every block.
            max_seqlen: most tokens of one image; with a capacity, attention then starts fewer empty programs. See
                :func:`dcdit.ops.select_tokens`.
            complete: with ``dynamic_width``, compute all heads and MLP groups, whatever the gates say.
            gate_noise: with ``dynamic_width``, (B, depth, n) with the sizes of ``config.gate_shape``, from
                :func:`dcdit.nn.gates.logistic_noise`. In training mode None draws it, else there is none.
            sliced: with ``dynamic_width``, the blocks of this timestep, for a forward pass without gradients; made by
                :class:`dcdit.models.SlicedModel`. Without them, what a gate closes is computed and masked.

        Returns:
            (B, 2C, H, W), or (B, C, H, W) without ``learn_sigma``; with ``return_routing`` a pair with
            :class:`Routing`; with ``return_states`` a triple with :class:`Routing` and :class:`BlockStates`.

        Raises:
            ValueError: a shape, a label or an option that is not accepted.
        """
        if capacity == "auto":
            plan = self.plan_capacity(len(x), drop_fraction)
            capacity, max_seqlen = plan.capacity, plan.max_seqlen if max_seqlen is None else max_seqlen
        if self.width_gates is None and (complete or gate_noise is not None or sliced is not None):
            raise ValueError("complete, gate_noise and sliced are for dynamic_width=True; this model has a fixed width")
        if sliced is not None and (complete or gate_noise is not None):
            raise ValueError("sliced blocks have the width of their timestep; leave complete and gate_noise out")
        encoded = self.encode(x, t, y)
        masked = not complete and sliced is None
        prepared: list[Prepared] = []
        packed, sel = self.chunk(
            encoded.tokens, encoded.prob, self.pos_embed, drop_fraction, budget, capacity, max_seqlen,
            meanwhile=lambda: prepared.append(self.prepare(encoded, masked, gate_noise)),
        )  # fmt: skip
        states = BlockStates(encoded.cond, []) if return_states else None
        outputs = None if states is None else states.outputs
        blocks = None if sliced is None else sliced.blocks
        out = self.decode(encoded, prepared[0], packed, sel, capacity is not None, outputs, blocks)
        if not (return_routing or return_states):
            return out
        gates = prepared[0].gates if sliced is None else sliced.gates_of(len(x))
        routing = Routing(encoded.prob, sel.mask, sel.natural_mask, sel, gates)
        return (out, routing) if states is None else (out, routing, states)

    def encode(self, x: Tensor, t: Tensor, y: Tensor) -> Encoded:
        """The part before the selection: no shape depends on what is kept. Arguments as in :meth:`forward`."""
        embedded = self.embed(x, t, y)
        with stage("encoder"):
            tokens = self.encoder(embedded.tokens, self.config.grid, embedded.conv_cond)
        return self.route(embedded._replace(tokens=tokens))

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> Embedded:
        """The conditioning and the embedded pixels or latents. Arguments as in :meth:`forward`."""
        check_inputs(self.config, x, t, y)
        with stage("embed"):
            time = self.t_embedder(t)
            embedded = time + self.y_embedder(y)
            # All that read the conditioning start with this SiLU.
            cond = F.silu(embedded)
            outer, adaptor = of_first_block(embedded), self.cond_adaptor
            conv_cond = of_first_block(cond) if adaptor is None else F.silu(adaptor(outer))
            x = x.to(dtype_of(self.x_embedder), memory_format=torch.channels_last)
            return Embedded(cond, conv_cond, to_tokens(self.x_embedder(x)), of_first_block(time))

    def route(self, embedded: Embedded) -> Encoded:
        """The router's probabilities for the encoder's output, which ``embedded.tokens`` (B, L, D) is by now."""
        with stage("router"):
            return Encoded(*embedded, self.router(embedded.tokens))

    def prepare(self, encoded: Encoded, masked: bool = True, gate_noise: Tensor | None = None) -> Prepared:
        """What the part after the selection needs and the selection has no part in.

        Args:
            encoded: of :meth:`encode`.
            masked: with ``dynamic_width``, whether the gates mask what they close.
            gate_noise: of the gates, as in :meth:`forward`.
        """
        with stage("transformer"):
            modulation = self.modulation(encoded.cond)
            gates = self.width_gates(encoded.time, gate_noise) if self.width_gates is not None and masked else None
        with stage("dechunk"):
            return Prepared(modulation, self.residual_proj(encoded.tokens), gates)

    def decode(
        self,
        encoded: Encoded,
        prepared: Prepared,
        packed: Tensor,
        sel: TokenSelection,
        padding: bool,
        outputs: list[Tensor] | None = None,
        blocks: Sequence[nn.Module] | None = None,
    ) -> Tensor:
        """The part after the selection: transformer, de-chunk, decoder, final layer -> (B, 2C, H, W).

        Args:
            encoded, prepared: of :meth:`encode` and :meth:`prepare`.
            packed: (T, D) the kept tokens.
            sel: which those are.
            padding: whether there may be padding rows.
            outputs: the packed tokens after each block are appended to it.
            blocks: smaller ones to take in place of the model's own.
        """
        tokens = self.transform_and_dechunk(encoded, prepared, packed, sel, padding, outputs, blocks)
        with stage("decoder"):
            tokens = self.decoder(tokens, self.config.grid, encoded.conv_cond)
        return self.project(tokens, encoded.cond)

    def transform_and_dechunk(
        self,
        encoded: Encoded,
        prepared: Prepared,
        packed: Tensor,
        sel: TokenSelection,
        padding: bool,
        outputs: list[Tensor] | None = None,
        blocks: Sequence[nn.Module] | None = None,
    ) -> Tensor:
        """From the kept tokens back to the grid, (B, L, D): the decoder's input. Arguments as in :meth:`decode`."""
        with stage("transformer"):
            varlen = VarlenMeta(sel.cu_seqlens, sel.max_seqlen, padding)
            packed = self.transform(packed, prepared.modulation, varlen, outputs, prepared.gates, blocks)
        with stage("dechunk"):
            return self.dechunk(packed, encoded.prob, sel, prepared.residual)

    def project(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """The final layer: the decoder's output (B, L, D/4) and the conditioning -> (B, 2C, H, W)."""
        with stage("final"):
            return to_grid(self.final_layer(tokens, of_first_block(cond)), self.config.grid).contiguous()

    def plan_capacity(self, batch: int, drop_fraction: float | Sequence[float] | Tensor = 0.0) -> Capacity:
        """The static sizes for ``batch`` images on this device, by ``kept_share``: :func:`dcdit.models.plan_capacity`.

        Raises:
            ValueError: nobody measured ``kept_share``, or the fractions are in a tensor: reading one is a sync.
        """
        if self.kept_share is None:
            raise ValueError(
                "capacity is 'auto' but model.kept_share is None; set it to what dcdit.sample.measure_kept_share finds"
            )
        if isinstance(drop_fraction, Tensor):
            raise ValueError(
                "capacity is 'auto' with drop fractions in a tensor; accepted: a number, or the capacity that "
                "model.plan_capacity(batch, [fraction of each image]) gives"
            )
        multiprocessors = multiprocessors_of(self.pos_embed.device)
        return plan_capacity(self.config, batch, self.kept_share, drop_fraction, multiprocessors=multiprocessors)

    def transform(
        self,
        tokens: Tensor,
        modulation: list[Modulation],
        varlen: VarlenMeta,
        outputs: list[Tensor] | None = None,
        gates: Gates | None = None,
        blocks: Sequence[nn.Module] | None = None,
    ) -> Tensor:
        """The inner transformer: packed tokens (T, D), the modulation of each block -> (T, D).

        It appends the tokens after each block to ``outputs``, masks what ``gates`` close, and takes ``blocks`` in place
        of its own.
        """
        widths = [()] * len(modulation) if gates is None else [(widths,) for widths in gates.of_blocks()]
        pending: PendingResidual | None = None
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block, mod, width in zip(self.blocks if blocks is None else blocks, modulation, widths, strict=True):
            inputs = (tokens, pending, mod, varlen, *width)
            tokens, pending = self._gradient_checkpointing_func(block, *inputs) if recompute else block(*inputs)
            if outputs is not None:
                outputs.append(gated_add(tokens, pending.branch, pending.gate, varlen.cu_seqlens))
        assert pending is not None
        return self.norm(gated_add(tokens, *pending, varlen.cu_seqlens))
