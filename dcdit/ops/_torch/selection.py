"""Token selection without loops over images; at most one size is read on the host."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops._torch.rows import segment_of_rows
from dcdit.ops.numerics import upcast
from dcdit.ops.token_selection import TokenSelection


def select_tokens(
    p: Tensor,
    cu_seqlens: Tensor | None,
    threshold: float,
    drop_fraction: float | Tensor,
    budget: int | None,
    capacity: int | None,
) -> TokenSelection:
    images = _Images(p, cu_seqlens)
    natural = upcast(p.flatten()) > threshold
    overflow = torch.zeros((), dtype=torch.int32, device=p.device)
    if budget is not None:
        mask = images.rank() >= images.to_rows(images.starts.diff() - budget)
    else:
        best = images.best()
        mask = natural | best
        if isinstance(drop_fraction, Tensor) or drop_fraction > 0:
            mask = images.drop(natural, drop_fraction) | best
        if capacity is not None:
            mask, overflow = _fit(images.p, mask, best, capacity)
    kept_before = F.pad(mask.cumsum(0, dtype=torch.int32), (1, 0))
    kept_starts = kept_before[images.starts]
    lengths = kept_starts.diff()
    if budget is not None:
        total, max_seqlen = budget * images.count, budget
    elif capacity is not None:
        total, max_seqlen = capacity, p.shape[-1]
    else:
        longest = lengths.max() if images.count else kept_starts[0]
        total, max_seqlen = torch.stack([kept_starts[-1], longest]).tolist()
    return TokenSelection(
        indices=_positions(mask, kept_before, total),
        cu_seqlens=kept_starts,
        lengths=lengths,
        max_seqlen=max_seqlen,
        mask=mask.view(p.shape),
        natural_mask=natural.view(p.shape),
        packed_rows=torch.where(mask, kept_before[:-1], -1).view(p.shape),
        overflow=overflow,
        source_cu_seqlens=cu_seqlens,
        prob_floor=0.0 if budget is not None else threshold,
    )


class _Images:
    """The flattened probabilities and where each image lies in them."""

    def __init__(self, p: Tensor, cu_seqlens: Tensor | None) -> None:
        self.p = p.flatten()
        self.position = torch.arange(self.p.shape[0], device=p.device)
        self.grid_shape = p.shape if cu_seqlens is None else None
        if cu_seqlens is None:
            self.count, length = p.shape
            image = torch.arange(self.count + 1, device=p.device)
            self.starts, self.of_rows = image * length, image[:-1, None].expand(p.shape).reshape(-1)
        else:
            self.count = cu_seqlens.shape[0] - 1
            self.starts = cu_seqlens.long()
            self.of_rows = segment_of_rows(self.starts, self.p.shape[0])

    def to_rows(self, per_image: Tensor) -> Tensor:
        return per_image.index_select(0, self.of_rows)

    def best(self) -> Tensor:
        """The highest p of each image, the last of equals."""
        if self.p.shape[0] == 0:
            return torch.zeros_like(self.p, dtype=torch.bool)
        top = self.p.new_full((self.count,), -torch.inf).scatter_reduce(0, self.of_rows, self.p, "amax")
        last = torch.where(self.p == self.to_rows(top), self.position, -1)
        last = self.position.new_full((self.count,), -1).scatter_reduce(0, self.of_rows, last, "amax")
        return self.position == self.to_rows(last)

    def rank(self, kept: Tensor | None = None) -> Tensor:
        """Place of each position in its image by ascending p, then ascending index; what is not kept comes last."""
        key = self.p if kept is None else torch.where(kept, self.p, torch.inf)
        if self.grid_shape is not None:
            order = (key.view(self.grid_shape).argsort(dim=1, stable=True) + self.starts[:-1, None]).flatten()
        else:
            order = key.argsort(stable=True)
            order = order.index_select(0, self.of_rows.index_select(0, order).argsort(stable=True))
        return torch.empty_like(order).scatter(0, order, self.position - self.to_rows(self.starts[:-1]))

    def drop(self, natural: Tensor, fraction: float | Tensor) -> Tensor:
        """natural without the given fraction of lowest p per image."""
        counts = F.pad(natural.cumsum(0), (1, 0)).index_select(0, self.starts).diff().float()
        n_drop = (counts * torch.as_tensor(fraction, dtype=torch.float32, device=counts.device)).floor()
        return natural & (self.rank(natural) >= self.to_rows(n_drop))


def _fit(p: Tensor, mask: Tensor, best: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Drop the lowest p of the whole batch until at most ``capacity`` are kept, never the best of an image."""
    overflow = (mask.sum() - capacity).clamp(min=0)
    order = torch.where(mask & ~best, p, torch.inf).argsort(stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(p.shape[0], device=p.device))
    return mask & (rank >= overflow), overflow.to(torch.int32)


def _positions(mask: Tensor, kept_before: Tensor, total: int) -> Tensor:
    """Positions of the kept tokens in a buffer of static size, -1 in its padding."""
    packed_rows = torch.where(mask, kept_before[:-1], total).long()
    out = torch.full((total + 1,), -1, dtype=torch.int64, device=mask.device)
    return out.scatter(0, packed_rows, torch.arange(mask.shape[0], device=mask.device))[:total]
