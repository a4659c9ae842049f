"""The DC-DiT reference implementation (AMD-AGI/DynamicChunkingDiT) on :mod:`dcdit.ops`.

Its outermost ``HNet`` sorts three times per forward, builds (B, M, M) and (B, L, M) tensors, and waits for the device
four times. Its DiT blocks write the modulation of every token, (T, 6D), to memory. The methods here select, gather with
positions, and de-chunk with gate and residual in one pass each, and read the modulation per image.

Everything else is its own: the encoder, the decoder, the attention module (whose hook counts FLOPs), what it returns
and caches. Where a hook or another class on a bypassed module would be ignored, its own ``forward`` runs instead.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dcdit import ops
from dcdit.nn.plain import is_plain, runs_only_forward
from dcdit.ops.autocast import without_autocast

THRESHOLD = 0.5
STAGE_PARTS = ("encoder", "main_network", "decoder", "routing_module", "chunk_layer", "dechunk_layer", "residual_proj")
ROUTER_PARTS = ("proj", "context_predictor", "residual_scorer")
BLOCK_PARTS = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")


def recognise(module: nn.Module) -> type | None:
    """The methods for one of its modules. ValueError for more than one chunking stage."""
    name = type(module).__name__
    if name == "HNetDiTBlock" and _has(module, BLOCK_PARTS) and module.mlp is not None:
        return FastBlock
    if name == "HNet" and _has(module, STAGE_PARTS) and _has(module.routing_module, ROUTER_PARTS):
        inner: Any = module.main_network
        if not getattr(inner, "is_innermost", False) or getattr(module, "stage_idx", 0) != 0:
            raise ValueError("this DC-DiT has more than one chunking stage; accepted: one")
        return FastStage
    return None


def _has(module: Any, parts: tuple[str, ...]) -> bool:
    return all(hasattr(module, part) for part in parts)


class FastStage:
    """``forward`` of the outermost ``HNet``."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        mask: Tensor | None,
        cond: Tensor | None = None,
        pos_embed: Tensor | None = None,
        flop_counter: Any = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, list[Any]]:
        rows, columns = mixer_kwargs.get("num_rows"), mixer_kwargs.get("num_cols")
        if rows is None or columns is None or not _bypassable(self):
            return super().forward(  # type: ignore[misc]
                hidden_states, mask, cond=cond, pos_embed=pos_embed, flop_counter=flop_counter, **mixer_kwargs
            )

        def track(part: str) -> contextlib.AbstractContextManager[None]:
            return flop_counter.track(part) if flop_counter else contextlib.nullcontext()

        grid, width = (rows, columns), hidden_states.shape[-1]
        with track("encoder"):
            encoded = self.encoder(hidden_states, mask=mask, cond=cond, **mixer_kwargs)
        residual = self.residual_proj(encoded.to(self.residual_proj.weight.dtype))
        with track("routing"):
            p = _probability(self.routing_module, encoded, grid)
            sel = _select(p, mask, mixer_kwargs.get("tail_dropping_fraction", 0.0))
        with track("chunk"):
            packed = _gather(encoded, sel, pos_embed)
        inner_kwargs = {name: value for name, value in mixer_kwargs.items() if name not in ("num_rows", "num_cols")}
        varlen = {"cu_seqlens": sel.cu_seqlens, "max_seqlen": sel.max_seqlen}
        packed, _ = self.main_network(
            packed[None], mask=None, cond=cond, pos_embed=None, flop_counter=flop_counter, **{**inner_kwargs, **varlen}
        )
        gate = torch.where(p > THRESHOLD, p, 1 - p)
        with track("dechunk"):
            sigma = self.dechunk_layer.kernel_sigma
            spread = ops.dechunk_spatial(packed[0], p, sel, grid, sigma, gate, residual).to(packed.dtype)
        with track("decoder"):
            out = self.decoder(spread, mask=mask, cond=cond, **mixer_kwargs)
        return out[..., :width], [_prediction(self.routing_module, p, gate, sel, mask)]


class FastBlock:
    """``forward`` of ``HNetDiTBlock``, where the tokens are packed."""

    def forward(
        self: Any,
        x: Tensor,
        residual: Any,
        cond: Tensor,
        mask: Tensor | None = None,
        mixer_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        varlen = {name: (mixer_kwargs or {}).get(name) for name in ("cu_seqlens", "max_seqlen")}
        starts = varlen["cu_seqlens"]
        if starts is None or not all(_plain_norm(norm) for norm in (self.norm1, self.norm2)):
            return super().forward(x, residual, cond, mask=mask, mixer_kwargs=mixer_kwargs, **kwargs)  # type: ignore
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(cond).chunk(6, dim=-1)
        x = x[0]
        h = ops.modulated_layer_norm(x, shift, scale, starts, self.norm1.eps)
        branch = self.attn(h[None], mask=mask, **varlen)[0]
        x, h = ops.gated_add_modulated_layer_norm(x, branch, gate, mlp_shift, mlp_scale, starts, self.norm2.eps)
        return ops.gated_add(x, self.mlp(h[None])[0], mlp_gate, starts)[None], None


def _bypassable(stage: Any) -> bool:
    """Whether calling the router, the chunk and the de-chunk layer would run their ``forward`` and nothing else."""
    parts = {
        "RoutingModule": stage.routing_module,
        "ChunkLayer": stage.chunk_layer,
        "DeChunkLayer": stage.dechunk_layer,
    }
    plain = all(type(part).__name__ == name and runs_only_forward(part) for name, part in parts.items())
    return plain and stage.pad_dimension is None and stage.dechunk_layer.plug_back_mode == "nearest_2d"


def _plain_norm(norm: nn.Module) -> bool:
    return is_plain(norm, nn.LayerNorm) and not norm.elementwise_affine


def _probability(router: Any, encoded: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, L) float32. Its convolutions run as modules; what follows them is one operation where they are plain."""
    with without_autocast(encoded) if router.fp32 else contextlib.nullcontext():
        x = encoded.float() if router.fp32 else encoded
        z = router.proj(x.unflatten(1, grid).permute(0, 3, 1, 2))
        conv, norm, act, out = router.residual_scorer
        plain = is_plain(router.residual_scorer, nn.Sequential) and is_plain(norm, nn.GroupNorm) and norm.affine
        plain = plain and is_plain(act, nn.SiLU) and is_plain(out, nn.Conv2d) and out.bias is not None
        error = z - router.context_predictor(z)
        if plain:
            weight = out.weight.flatten(1)
            return ops.boundary_prob_predictability(
                conv(error), norm.weight, norm.bias, weight, out.bias, norm.num_groups, norm.eps
            )
        p = torch.sigmoid(router.residual_scorer(error).flatten(1).float())
        position = torch.arange(p.shape[1], device=p.device)
        return p.masked_fill((position == 0) | (position == p.shape[1] - 1), 1.0)


def _select(p: Tensor, mask: Tensor | None, drop_fraction: float | Tensor) -> ops.TokenSelection:
    scores = p.detach() if mask is None else p.detach() * mask  # a position outside of the mask is never kept
    if isinstance(drop_fraction, Tensor):
        drop_fraction = drop_fraction.to(p).flatten()
    return ops.select_tokens(scores, threshold=THRESHOLD, drop_fraction=drop_fraction)


def _gather(encoded: Tensor, sel: ops.TokenSelection, pos_embed: Tensor | None) -> Tensor:
    """(T, D). The sum with the positions has the wider dtype of the two, as it has there."""
    if pos_embed is None:
        return ops.gather_tokens(encoded, sel)
    return ops.gather_tokens(encoded.to(torch.promote_types(encoded.dtype, pos_embed.dtype)), sel, pos_embed[0])


def _prediction(router: Any, p: Tensor, gate: Tensor, sel: ops.TokenSelection, mask: Tensor | None) -> Any:
    """What its router returns, in the dtypes that it has there: masks become those of ``mask``."""
    kind = type(router).forward.__globals__["RoutingModuleOutput"]  # its module may exist under several names
    masks = (sel.mask, sel.natural_mask) if mask is None else (sel.mask & mask, sel.natural_mask & mask)
    return kind(
        boundary_prob=torch.stack((1 - p, p), dim=-1),
        boundary_mask=masks[0],
        selected_probs=gate[..., None],
        boundary_mask_natural=masks[1],
    )
