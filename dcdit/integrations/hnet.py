"""H-Net's dynamic chunking (goombalab/hnet, module ``hnet.modules.dc``) on :mod:`dcdit.ops`.

What its three modules take, return and keep in their caches stays as it is. Inside:

- boundary probabilities are one pass over queries and keys, in float32;
- chunking a padded batch needs no sort;
- the moving average is one scan in float32, without Mamba-2's kernel, which gets it rounded to bfloat16;
- ``DeChunkLayer.step`` works for any batch. Its own multiplies (B,) with (B, D), which is right for B = 1 only.

Its caches for decoding keep their form: the last hidden state before the projection, and the last value of the average.
New caches hold that value in float32, so that a long decode does not drift.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dcdit import ops
from dcdit.ops.numerics import PROB_EPS, upcast

THRESHOLD = 0.5


def recognise(module: nn.Module) -> type | None:
    """The methods for one of its modules."""
    name = type(module).__name__
    if name == "RoutingModule" and hasattr(module, "q_proj_layer") and hasattr(module, "k_proj_layer"):
        return FastRouting
    if name == "DeChunkLayer" and hasattr(module, "headdim") and hasattr(module, "block_size"):
        return FastDeChunk
    if name == "ChunkLayer" and hasattr(module, "step"):  # the DC-DiT of another code base has a ChunkLayer without
        return FastChunk
    return None


class FastRouting:
    """``forward`` and ``step`` of ``RoutingModule``."""

    def forward(
        self: Any, hidden_states: Tensor, cu_seqlens: Tensor | None = None, mask: Tensor | None = None,
        inference_params: Any = None,
    ) -> Any:  # fmt: skip
        _need_one(cu_seqlens, mask)
        filled = None if inference_params is None else _prefilled(inference_params, mask)
        q, k = self.q_proj_layer(hidden_states), self.k_proj_layer(hidden_states)
        p = ops.boundary_prob_cosine(q, k, cu_seqlens)
        boundary_mask = p > THRESHOLD
        if mask is not None:
            boundary_mask = boundary_mask & mask
        if filled is not None:
            _remember(inference_params, hidden_states, filled)
        return _prediction(self, p, boundary_mask)

    def step(self: Any, hidden_states: Tensor, inference_params: Any) -> Any:
        x = hidden_states.squeeze(1)
        q, k = self.q_proj_layer(inference_params.last_hidden_state.to(x.dtype)), self.k_proj_layer(x)
        # Each pair is a sequence of two tokens, so that the rounding is that of the forward pass.
        p = ops.boundary_prob_cosine(torch.stack([q, q], 1), torch.stack([k, k], 1))[:, 1]
        p = torch.where(inference_params.has_seen_tokens, p, 1.0)
        inference_params.last_hidden_state.copy_(x)
        inference_params.has_seen_tokens.fill_(True)
        return _prediction(self, p, p > THRESHOLD)


class FastChunk:
    """``forward`` of ``ChunkLayer``."""

    def forward(
        self: Any, hidden_states: Tensor, boundary_mask: Tensor, cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, int | None, Tensor | None]:  # fmt: skip
        _need_one(cu_seqlens, mask)
        sel = ops.select_from_mask(boundary_mask, cu_seqlens)
        chunks = ops.gather_tokens(hidden_states, sel)
        if cu_seqlens is not None:
            return chunks, sel.cu_seqlens.to(cu_seqlens.dtype), sel.max_seqlen, None
        batch, longest = hidden_states.shape[0], sel.max_seqlen
        padded = chunks.new_zeros(batch * longest, chunks.shape[1]).index_copy(0, _rows(sel, longest), chunks)
        valid = torch.arange(longest, device=chunks.device) < sel.lengths[:, None]
        return padded.unflatten(0, (batch, longest)), None, None, valid


class FastDeChunk:
    """``forward``, ``step`` and ``allocate_inference_cache`` of ``DeChunkLayer``."""

    def allocate_inference_cache(
        self: Any, batch_size: int, max_seqlen: int, device: Any, dtype: torch.dtype | None = None
    ) -> Any:
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        return super().allocate_inference_cache(batch_size, max_seqlen, device, dtype=wide)  # type: ignore[misc]

    def forward(
        self: Any, hidden_states: Tensor, boundary_mask: Tensor, boundary_prob: Tensor,
        cu_seqlens: Tensor | None = None, inference_params: Any = None, mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if inference_params is not None and mask is None:
            raise ValueError("a prefill needs the mask of its tokens")
        if cu_seqlens is None:
            sel = ops.select_from_mask(boundary_mask)
            chunks = hidden_states.flatten(0, 1)[_rows(sel, hidden_states.shape[1])]
        else:
            sel, chunks = ops.select_from_mask(boundary_mask, _starts(boundary_mask, cu_seqlens)), hidden_states
        wanted = chunks if inference_params is None else upcast(chunks)
        out = ops.dechunk_ema(wanted, boundary_prob[..., -1], sel)
        if inference_params is not None:
            inference_params.last_value.copy_(out[:, -1])
        return out.to(hidden_states.dtype)

    def step(
        self: Any, hidden_states: Tensor, boundary_mask: Tensor, boundary_prob: Tensor, inference_params: Any
    ) -> Tensor:
        held = inference_params.last_value
        wide = torch.promote_types(held.dtype, torch.float32)
        opened = boundary_mask[:, None]
        chunks = torch.zeros_like(held, dtype=wide).masked_scatter(opened, hidden_states.to(wide))
        q = boundary_prob[:, -1:].to(wide).clamp(PROB_EPS, 1 - PROB_EPS)
        value = torch.where(opened, q * chunks + (1 - q) * held, held.to(wide))
        held.copy_(value)
        return value.to(hidden_states.dtype).unsqueeze(1)


def _need_one(cu_seqlens: Tensor | None, mask: Tensor | None) -> None:
    if cu_seqlens is None and mask is None:
        raise ValueError("neither mask nor cu_seqlens is given; accepted: one of them")


def _prefilled(inference_params: Any, mask: Tensor | None) -> Tensor:
    """The mask of the tokens that a new cache is filled with."""
    if mask is None:
        raise ValueError("a prefill needs the mask of its tokens")
    if inference_params.has_seen_tokens.any():
        raise ValueError("the cache has seen tokens; accepted for whole sequences: a new cache")
    return mask


def _remember(inference_params: Any, hidden_states: Tensor, mask: Tensor) -> None:
    """Put the last token of each row into the cache. Padding is behind the tokens."""
    some = mask.any(dim=-1)
    last = (mask.sum(dim=-1) - 1).clamp(min=0)
    rows = hidden_states[torch.arange(len(last), device=last.device), last]
    state = inference_params.last_hidden_state
    state.copy_(torch.where(some[:, None], rows.to(state.dtype), state))
    inference_params.has_seen_tokens.logical_or_(some)


def _prediction(router: Any, p: Tensor, boundary_mask: Tensor) -> Any:
    """What its router returns: (..., 2) probabilities, mask, and the larger probability (..., 1)."""
    kind = type(router).original.forward.__globals__["RoutingModuleOutput"]
    return kind(
        boundary_prob=torch.stack((1 - p, p), dim=-1),
        boundary_mask=boundary_mask,
        selected_probs=torch.where(p > THRESHOLD, p, 1 - p)[..., None],
    )


def _rows(sel: ops.TokenSelection, longest: int) -> Tensor:
    """(T,) int64: the row of each chunk in a padded batch (B * longest, D)."""
    image = torch.div(sel.indices, sel.mask.shape[1], rounding_mode="floor").long()
    return image * longest + torch.arange(len(image), device=image.device) - sel.cu_seqlens[image]


def _starts(boundary_mask: Tensor, next_cu_seqlens: Tensor) -> Tensor:
    """int64 (B+1,) of the tokens, from that of the chunks: the first token of every sequence opens a chunk."""
    return torch.searchsorted(boundary_mask.cumsum(0), next_cu_seqlens.long() + 1)
