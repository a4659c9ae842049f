"""Token selection without a loop over images. It reads at most one size on the host."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops._torch.segments import segment_of_rows
from dcdit.ops.numerics import upcast
from dcdit.ops.token_selection import PendingSelection, TokenSelection
from dcdit.utils.cuda import PendingRead


def select_tokens(
    p: Tensor,
    cu_seqlens: Tensor | None,
    threshold: float,
    drop_fraction: float | Tensor,
    budget: int | None,
    capacity: int | None,
    max_seqlen: int | None,
    always: Tensor | None,
) -> PendingSelection:
    natural = upcast(p.flatten()) > threshold
    prob_floor = threshold if budget is None and always is None else 0.0
    fixed = None if always is None else always.flatten()
    images = _Images(p if always is None else torch.where(always, above_every_prob(p), upcast(p)), cu_seqlens)
    if budget is not None:
        mask = images.drop_order() >= images.to_positions(images.starts.diff() - budget)
        return _pack(images, mask, natural, _no_overflow(p), budget, None, None, prob_floor)
    chosen = natural if fixed is None else natural & ~fixed
    if isinstance(drop_fraction, Tensor) or drop_fraction > 0:
        chosen = images.drop(chosen, drop_fraction)
    best = images.best()
    mask = chosen | best if fixed is None else chosen | best | fixed
    mask, overflow = _fit(images, mask, best, capacity, max_seqlen)
    return _pack(images, mask, natural, overflow, None, capacity, max_seqlen, prob_floor)


def select_from_mask(
    mask: Tensor, cu_seqlens: Tensor | None, capacity: int | None, max_seqlen: int | None
) -> PendingSelection:
    images, kept = _Images(mask.float(), cu_seqlens), mask.flatten()
    fitting, overflow = kept, _no_overflow(mask)
    if capacity is not None or max_seqlen is not None:
        fitting, overflow = _fit(images, kept, images.best() & kept, capacity, max_seqlen)
    return _pack(images, fitting, kept, overflow, None, capacity, max_seqlen, 0.0)


def above_every_prob(p: Tensor) -> Tensor:
    """Numbers above 1 in the order of p, upcast: p with a larger exponent, at most the largest finite number."""
    p = upcast(p).clamp(0, 1).abs()  # -0.0 is 0.0
    bits, step = (torch.int64, 2**62 - 1) if p.dtype == torch.float64 else (torch.int32, 2**30 - 1)
    return (p.view(bits) + step).view(p.dtype)


def _no_overflow(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int32, device=like.device)


def _fit(
    images: "_Images", mask: Tensor, best: Tensor, capacity: int | None, max_seqlen: int | None
) -> tuple[Tensor, Tensor]:
    """The mask without what does not fit, and how many were dropped."""
    overflow = _no_overflow(mask)
    if max_seqlen is not None:
        mask, overflow = images.limit(mask, max_seqlen)
    if capacity is not None:
        mask, excess = _fit_capacity(images.p, mask, best, capacity)
        overflow = overflow + excess
    return mask, overflow


def _pack(
    images: "_Images",
    mask: Tensor,
    natural: Tensor,
    overflow: Tensor,
    budget: int | None,
    capacity: int | None,
    max_seqlen: int | None,
    prob_floor: float,
) -> PendingSelection:
    """The selection of the mask (S,)."""
    shape = images.shape
    # (S + 1,): number of kept positions before each position.
    prefix_count = F.pad(mask.cumsum(0, dtype=torch.int32), (1, 0))
    kept_starts = prefix_count[images.starts]
    lengths = kept_starts.diff()
    sizes = None
    if budget is not None:
        total, bound = budget * images.count, budget
    elif capacity is not None:
        total, bound = capacity, shape[-1] if max_seqlen is None else min(max_seqlen, shape[-1])
    else:
        longest = lengths.max() if images.count else kept_starts[0]
        sizes = PendingRead(torch.stack([kept_starts[-1], longest]))
        total, bound = mask.numel(), shape[-1]
    selection = TokenSelection(
        indices=_kept_positions(mask, prefix_count, total),
        cu_seqlens=kept_starts,
        lengths=lengths,
        max_seqlen=bound,
        mask=mask.view(shape),
        natural_mask=natural.view(shape),
        packed_rows=torch.where(mask, prefix_count[:-1], -1).view(shape),
        overflow=overflow,
        source_cu_seqlens=images.cu_seqlens,
        prob_floor=prob_floor,
    )
    return PendingSelection(selection, sizes)


class _Images:
    """The flattened probabilities (S,), and where each image lies in them."""

    def __init__(self, p: Tensor, cu_seqlens: Tensor | None) -> None:
        self.p, self.shape, self.cu_seqlens = p.flatten(), p.shape, cu_seqlens
        self.position = torch.arange(self.p.shape[0], device=p.device)
        self.grid_shape = p.shape if cu_seqlens is None else None
        if cu_seqlens is None:
            self.count, length = p.shape
            image = torch.arange(self.count + 1, device=p.device)
            self.starts, self.image_of = image * length, image[:-1, None].expand(p.shape).reshape(-1)
        else:
            self.count = cu_seqlens.shape[0] - 1
            self.starts = cu_seqlens.long()
            self.image_of = segment_of_rows(self.starts, self.p.shape[0])

    def to_positions(self, per_image: Tensor) -> Tensor:
        """(S,): at each position, the value of its image."""
        return per_image.index_select(0, self.image_of)

    def best(self) -> Tensor:
        """(S,) bool: the position of the highest p in each image; of equals the last."""
        if self.p.shape[0] == 0:
            return torch.zeros_like(self.p, dtype=torch.bool)
        top = self.p.new_full((self.count,), -torch.inf).scatter_reduce(0, self.image_of, self.p, "amax")
        last = torch.where(self.p == self.to_positions(top), self.position, -1)
        last = self.position.new_full((self.count,), -1).scatter_reduce(0, self.image_of, last, "amax")
        return self.position == self.to_positions(last)

    def drop_order(self, kept: Tensor | None = None) -> Tensor:
        """(S,) int64: how many positions of the same image are dropped before each position.

        The lowest p is dropped first; among equals, the lowest index. Positions that are not kept come last.
        """
        key = self.p if kept is None else torch.where(kept, self.p, torch.inf)
        if self.grid_shape is not None:
            order = (key.view(self.grid_shape).argsort(dim=1, stable=True) + self.starts[:-1, None]).flatten()
        else:
            order = key.argsort(stable=True)
            order = order.index_select(0, self.image_of.index_select(0, order).argsort(stable=True))
        return torch.empty_like(order).scatter(0, order, self.position - self.to_positions(self.starts[:-1]))

    def drop(self, natural: Tensor, fraction: float | Tensor) -> Tensor:
        """(S,) bool: ``natural`` without the given fraction of lowest p in each image."""
        counts = F.pad(natural.cumsum(0), (1, 0)).index_select(0, self.starts).diff().float()
        if not isinstance(fraction, Tensor):  # made on the device: a copy from the host is no part of a CUDA graph
            fraction = torch.full((), fraction, dtype=torch.float32, device=counts.device)
        n_drop = (counts * fraction).floor()
        return natural & (self.drop_order(natural) >= self.to_positions(n_drop))

    def limit(self, mask: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """The mask without the lowest p of each image that keeps more than ``longest``, and how many were dropped."""
        excess = (F.pad(mask.cumsum(0), (1, 0)).index_select(0, self.starts).diff() - longest).clamp(min=0)
        return mask & (self.drop_order(mask) >= self.to_positions(excess)), excess.sum().to(torch.int32)


def _fit_capacity(p: Tensor, mask: Tensor, best: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Drop the lowest p of the batch until at most ``capacity`` are kept, never the best of an image.

    Returns the new mask and how many were dropped.
    """
    overflow = (mask.sum() - capacity).clamp(min=0)
    order = torch.where(mask & ~best, p, torch.inf).argsort(stable=True)
    drop_order = torch.empty_like(order).scatter(0, order, torch.arange(p.shape[0], device=p.device))
    return mask & (drop_order >= overflow), overflow.to(torch.int32)


def _kept_positions(mask: Tensor, prefix_count: Tensor, total: int) -> Tensor:
    """(total,) int64: the position of each packed row, -1 for padding rows."""
    packed_rows = torch.where(mask, prefix_count[:-1], total).long()
    out = torch.full((total + 1,), -1, dtype=torch.int64, device=mask.device)
    return out.scatter(0, packed_rows, torch.arange(mask.shape[0], device=mask.device))[:total]
