"""The kept tokens of a batch: what selection returns and every later operation reads."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.utils.cuda import PendingRead
from dcdit.utils.deprecation import warn_renamed


class TokenSelection(NamedTuple):
    """The kept tokens of a batch, packed image after image, in raster order inside an image.

    The source is a grid batch (B, L) or packed sequences (S,). A packed buffer of a given capacity ends in padding
    rows, past ``cu_seqlens[-1]``: their index is -1, and the operations write zeros there.
    :func:`dcdit.ops.select_tokens` keeps at least one token of every non-empty image. With
    :func:`dcdit.ops.select_from_mask` an image may keep none.

    With extra tokens, such as a class token or registers, the source is (B, n + L): each image has n tokens outside of
    the grid, which come first and are kept. Then ``natural_mask`` is (B, L), as p is.

    Example:
        >>> sel = ops.select_tokens(torch.tensor([[0.9, 0.2, 0.7], [0.6, 0.8, 0.9]]))
        >>> sel.indices.tolist(), sel.cu_seqlens.tolist(), sel.lengths.tolist(), sel.max_seqlen
        ([0, 2, 3, 4, 5], [0, 2, 5], [2, 3], 3)
        >>> sel.mask.int().tolist(), sel.packed_rows.tolist()
        ([[1, 0, 1], [1, 1, 1]], [[0, -1, 1], [2, 3, 4]])
    """

    indices: Tensor
    """(T,) int64: position of each packed row in the flattened source, -1 for padding rows."""
    cu_seqlens: Tensor
    """(B+1,) int32: packed row at which each image starts."""
    lengths: Tensor
    """(B,) int32: kept tokens of each image."""
    max_seqlen: int
    """Upper bound of ``lengths``; equal to the largest where no capacity was given."""
    mask: Tensor
    """bool, shape of the source: the kept positions."""
    natural_mask: Tensor
    """bool, shape of p: p above the threshold, before any token is dropped. The ratio loss reads it."""
    packed_rows: Tensor
    """int32, shape of the source: packed row of each kept position, -1 elsewhere (the inverse of ``indices``)."""
    overflow: Tensor
    """() int32: how many tokens were dropped because the capacity or ``max_seqlen`` was too small."""
    source_cu_seqlens: Tensor | None
    """(B+1,), int32 or int64 as given: where each sequence of a packed source starts; None for a grid batch."""
    prob_floor: float
    """Lower bound on the p of each kept token of an image that keeps several; 0 where p alone did not choose."""
    grid_selection: "TokenSelection | None" = None
    """The selection of the grid alone where there are extra tokens, else None."""

    @property
    def extra_tokens(self) -> int:
        """How many tokens of each image lie outside of the grid."""
        return 0 if self.grid_selection is None else self.mask.shape[1] - self.grid_selection.mask.shape[1]

    @property
    def slots(self) -> Tensor:
        """The former name of ``packed_rows``."""
        warn_renamed("TokenSelection.slots", "TokenSelection.packed_rows")
        return self.packed_rows


class PendingSelection(NamedTuple):
    """A selection whose size may still be on its way to the host. Meanwhile the device can be given other work."""

    selection: TokenSelection
    """Without a static size, its indices are as many as there are positions, and its max_seqlen means nothing."""
    sizes: PendingRead | None
    """Of two numbers: how many tokens are kept, and how many the longest image keeps. None: the size is static."""
    extra_tokens: int = 0
    """How many tokens :meth:`wait` puts before those of each image."""

    def wait(self) -> TokenSelection:
        """The selection, as :func:`dcdit.ops.select_tokens` returns it."""
        found = self.selection
        if self.sizes is not None:
            total, longest = self.sizes.wait()
            found = _changed(found, indices=found.indices[:total], max_seqlen=longest)
        return with_extra_tokens(found, self.extra_tokens) if self.extra_tokens else found


def with_extra_tokens(grid: TokenSelection, extra_tokens: int) -> TokenSelection:
    """The selection of a grid batch (B, L), with ``extra_tokens`` kept tokens before those of each image."""
    images, device = grid.mask.shape[0], grid.mask.device
    image = torch.arange(images + 1, device=device, dtype=torch.int32)
    cu_seqlens = grid.cu_seqlens + image * extra_tokens
    extra_rows = cu_seqlens[:-1, None] + torch.arange(extra_tokens, device=device, dtype=torch.int32)
    grid_rows = torch.where(grid.mask, grid.packed_rows + (image[1:] * extra_tokens)[:, None], -1)
    packed_rows = torch.cat([extra_rows, grid_rows], 1)
    return _changed(
        grid,
        indices=_inverse(packed_rows, grid.indices.shape[0] + images * extra_tokens),
        cu_seqlens=cu_seqlens,
        lengths=grid.lengths + extra_tokens,
        max_seqlen=grid.max_seqlen + extra_tokens,
        mask=F.pad(grid.mask, (extra_tokens, 0), value=True),
        packed_rows=packed_rows,
        grid_selection=grid,
    )


def _changed(sel: TokenSelection, **fields: Any) -> TokenSelection:
    """As ``_replace`` does it, but torch.compile of PyTorch 2.11 can return this one."""
    values: list[Any] = [fields.get(name, value) for name, value in zip(sel._fields, sel, strict=True)]
    return TokenSelection(*values)


def _inverse(packed_rows: Tensor, total: int) -> Tensor:
    """(total,) int64: the position of each packed row, -1 where no position leads to one."""
    rows = packed_rows.flatten().long()
    out = torch.full((total + 1,), -1, dtype=torch.int64, device=rows.device)
    position = torch.arange(rows.shape[0], device=rows.device)
    return out.scatter(0, torch.where(rows < 0, total, rows), position)[:total]
