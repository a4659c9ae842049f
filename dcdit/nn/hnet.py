"""Dynamic chunking of 1-D sequences, in training and one token at a time (H-Net, arXiv 2507.07955, section 2.2).

A stage of an H-Net is a :class:`RoutingModule`, a :class:`ChunkLayer`, an inner network over the packed chunks (it may
hold further stages) and a :class:`DeChunkLayer`. Everything is causal. The forward pass takes packed sequences (S, D)
with ``cu_seqlens``, or a padded batch (B, L, D) with a mask. Chunks are always packed.

Decoding keeps one cache row per sequence of the batch. Sequences open their chunks at different steps, so every
``step`` takes the rows to advance and leaves the others as they are. An inner stage gets the rows for which its outer
stage opened a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcdit import ops
from dcdit.nn.chunk import EMADeChunk, ste_coefficient
from dcdit.nn.routers import CosineProjections
from dcdit.ops import TokenSelection, checks
from dcdit.ops.numerics import PROB_EPS, upcast
from dcdit.utils.modules import dtype_of

__all__ = ["ChunkLayer", "DeChunkCache", "DeChunkLayer", "RoutingCache", "RoutingModule"]

THRESHOLD = 0.5


@dataclass
class RoutingCache:
    """What :meth:`RoutingModule.step` remembers of B sequences.

    Example:
        >>> from dcdit.nn import hnet
        >>> cache = hnet.RoutingModule(8).allocate_inference_cache(batch_size=2)
        >>> cache.query.shape, cache.started.tolist()
        (torch.Size([2, 8]), [False, False])
    """

    query: Tensor
    """(B, D): the projected last token."""
    started: Tensor
    """(B,) bool: whether there was a token."""


@dataclass
class DeChunkCache:
    """What :meth:`DeChunkLayer.step` remembers of B sequences.

    Example:
        >>> import torch
        >>> from dcdit.nn import hnet
        >>> hnet.DeChunkLayer().allocate_inference_cache(batch_size=2, like=torch.zeros(1, 3)).held.tolist()
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """

    held: Tensor
    """(B, D) float32 (float64 for float64 tokens): the moving average, 0 before the first chunk."""


class RoutingModule(CosineProjections):
    """The probability that a token opens a chunk: its cosine dissimilarity to the token before it.

    ``load_state_dict`` also reads the names of goombalab/hnet, ``q_proj_layer`` and ``k_proj_layer``.

    Args:
        dim: D.

    Example:
        >>> import torch
        >>> from dcdit.nn import hnet
        >>> routing, x = hnet.RoutingModule(2), torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
        >>> routing(x, torch.tensor([0, 3]).int()).tolist()  # the same token, then the opposite
        [1.0, 0.0, 1.0]
        >>> cache = routing.allocate_inference_cache(1)
        >>> [routing.step(x[i : i + 1], cache).item() for i in range(3)]  # one token at a time
        [1.0, 0.0, 1.0]
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.dim = dim
        self.register_load_state_dict_pre_hook(_rename_projections)
        self.reset_parameters()

    def allocate_inference_cache(self, batch_size: int) -> RoutingCache:
        """A cache for sequences that have not started."""
        # An adapter in place of the projection may have no attribute `weight`, and a quantised or sharded weight has
        # another shape or type than a cache.
        device = next((weight.device for weight in self.query.parameters()), None)
        return RoutingCache(
            query=torch.zeros(batch_size, self.dim, dtype=dtype_of(self.query), device=device),
            started=torch.zeros(batch_size, dtype=torch.bool, device=device),
        )

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        cache: RoutingCache | None = None,
    ) -> Tensor:
        """Boundary probabilities of whole sequences.

        Args:
            x: (B, L, D), or packed (S, D) with ``cu_seqlens``.
            cu_seqlens: int32 (B+1,).
            mask: (B, L) bool, False in padding. The tokens of a row are one run, with padding before or after them.
            cache: overwritten with the state after the last token of every sequence.

        Returns:
            (B, L) or (S,) float32 (float64 for float64 x): 1 at the first token of a sequence, 0 in padding.

        Raises:
            ValueError, TypeError: shapes or dtypes do not fit, both ``mask`` and ``cu_seqlens``, or (on a GPU only with
                ``DCDIT_CHECK=1``) a row of the mask that is not one run.
        """
        if mask is not None:
            _check_mask(mask, x, cu_seqlens)
        q, k = self.query(x), self.key(x)
        p = ops.boundary_prob_cosine(q, k, cu_seqlens)
        if mask is not None:
            before = nn.functional.pad(mask[:, :-1], (1, 0))
            p = p.masked_fill(mask & ~before, 1.0).masked_fill(~mask, 0.0)
        if cache is not None:
            last, seen = _last_rows(x, cu_seqlens, mask)
            cache.query = torch.where(seen[:, None], q.flatten(0, -2)[last], 0).detach()
            cache.started = seen
        return p

    @torch.no_grad()
    def step(self, x: Tensor, cache: RoutingCache, rows: Tensor | None = None) -> Tensor:
        """Boundary probabilities (B',) of the next token (B', D) of some sequences.

        Args:
            rows: (B',) int64, the cache rows of these sequences. None is all rows, in order.
        """
        q, k = self.query(x), self.key(x)
        previous, started = _take(cache.query, rows).to(q.dtype), _take(cache.started, rows)
        # Each pair is a sequence of two tokens, so that the rounding is that of the forward pass.
        p = ops.boundary_prob_cosine(torch.stack([previous, q], 1), torch.stack([k, k], 1))[:, 1]
        p = p.masked_fill(~started, 1.0)
        _put(cache.query, rows, q)
        _put(cache.started, rows, torch.ones_like(started))
        return p


class ChunkLayer(nn.Module):
    """Packs the tokens that open a chunk: those with p > 0.5.

    Example:
        >>> import torch
        >>> from dcdit.nn import hnet
        >>> x, p = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1.0, 0.1, 0.9])
        >>> chunks, sel = hnet.ChunkLayer()(x, p, torch.tensor([0, 3]).int())
        >>> chunks.tolist(), sel.cu_seqlens.tolist()
        ([[1.0], [3.0]], [0, 2])
    """

    def forward(self, x: Tensor, p: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, TokenSelection]:
        """(B, L, D), or packed (S, D) with ``cu_seqlens``, and p -> chunks (T, D) and their selection.

        The inner network reads ``sel.cu_seqlens`` and ``sel.max_seqlen``.
        """
        sel = ops.select_tokens(p, cu_seqlens, THRESHOLD)
        return ops.gather_tokens(x, sel), sel

    def step(self, x: Tensor, p: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Next tokens (B', D), their p (B',) and their cache rows -> the tokens that open a chunk, and their rows.

        Where no token opens a chunk both are empty, and the inner network has nothing to do. The host reads one size
        from the device.
        """
        opened = (p > THRESHOLD).nonzero().squeeze(1)
        return x[opened], opened if rows is None else rows[opened]


class DeChunkLayer(EMADeChunk):
    """Spreads chunks over their tokens: a moving average weighted by p, held until the next chunk.

    It applies the straight-through coefficient of p and adds the residual, too.

    Example:
        >>> import torch
        >>> from dcdit.nn import hnet
        >>> x, p = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([1.0, 0.1, 0.75])
        >>> chunks, sel = hnet.ChunkLayer()(x, p, torch.tensor([0, 3]).int())
        >>> hnet.DeChunkLayer()(chunks, p, sel, residual=torch.zeros(3, 1)).squeeze()  # 4 = 0.75 * 5 + 0.25 * 1
        tensor([0.9999, 0.9999, 4.0000])
    """

    def allocate_inference_cache(self, batch_size: int, like: Tensor) -> DeChunkCache:
        """A cache for sequences that have not started; ``like`` (..., D) has the device and the dtype of the chunks."""
        return DeChunkCache(upcast(like).new_zeros(batch_size, like.shape[-1]))

    def forward(
        self, h: Tensor, p: Tensor, sel: TokenSelection, residual: Tensor, cache: DeChunkCache | None = None
    ) -> Tensor:
        """Whole sequences: chunks (T, D), p and selection as from :class:`ChunkLayer` -> tokens, (B, L, D) or (S, D).

        Args:
            residual: (B, L, D) or (S, D), added to the result.
            cache: overwritten with the state after the last token of every sequence.
        """
        if cache is None:
            return super().forward(h, p, sel, residual)
        # The cache keeps the average before the residual is added and before it is rounded to the dtype of h.
        held = ops.dechunk_ema(upcast(h), p, sel, ste_coefficient(p))
        last, seen = _last_rows(held, sel.source_cu_seqlens, None)
        cache.held = torch.where(seen[:, None], held.flatten(0, -2)[last], 0).detach()
        return (held + residual).to(h.dtype)

    @torch.no_grad()
    def step(self, h: Tensor, p: Tensor, cache: DeChunkCache, residual: Tensor, rows: Tensor | None = None) -> Tensor:
        """The next tokens (B', D) of some sequences.

        Args:
            h: (B'', D), the inner network's output for the chunks that :meth:`ChunkLayer.step` returned, in its order.
            p: (B',), of all B' tokens.
            residual: (B', D), added to the result.
            rows: (B',) int64, the cache rows of these sequences. None is all rows, in order.
        """
        held = _take(cache.held, rows)
        opened = (p > THRESHOLD)[:, None]
        chunks = torch.zeros_like(held).masked_scatter(opened, h.to(held.dtype))
        q = p.to(held.dtype).clamp(PROB_EPS, 1 - PROB_EPS)[:, None]
        held = torch.where(opened, q * chunks + (1 - q) * held, held)
        _put(cache.held, rows, held)
        return (held + residual).to(h.dtype)


def _rename_projections(module: nn.Module, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Give the projections of goombalab/hnet the names that they have here."""
    for theirs, ours in (("q_proj_layer", "query"), ("k_proj_layer", "key")):
        if f"{prefix}{theirs}.weight" in state:
            state[f"{prefix}{ours}.weight"] = state.pop(f"{prefix}{theirs}.weight")


def _check_mask(mask: Tensor, x: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise ValueError("both mask and cu_seqlens are given; accepted: cu_seqlens for packed x, or mask for padded x")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; accepted: bool")
    if x.dim() != 3 or mask.shape != x.shape[:2]:
        raise ValueError(f"mask has shape {tuple(mask.shape)} for x {tuple(x.shape)}; accepted: the (B, L) of x")
    if checks.value_checks_enabled(mask):
        starts = (mask & ~nn.functional.pad(mask[:, :-1], (1, 0))).sum(1)
        if bool((starts != 1).any()):
            raise ValueError("a row of mask is not one run of True; accepted: padding before and after it only")


def _last_rows(x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B,) index of each sequence's last token in x.flatten(0, -2), and (B,) bool whether there is one."""
    if cu_seqlens is not None:
        return (cu_seqlens[1:].long() - 1).clamp(min=0), cu_seqlens.diff() > 0
    images, length = x.shape[:2]
    starts = torch.arange(0, images * length, length, device=x.device)
    if mask is None:
        return starts + length - 1, torch.ones_like(starts, dtype=torch.bool)
    position = torch.arange(length, device=x.device)
    return starts + torch.where(mask, position, 0).amax(1), mask.any(1)


def _take(cache: Tensor, rows: Tensor | None) -> Tensor:
    return cache if rows is None else cache[rows]


def _put(cache: Tensor, rows: Tensor | None, values: Tensor) -> None:
    if rows is None:
        cache.copy_(values)
    else:
        cache.index_copy_(0, rows, values.to(cache.dtype))
