"""The kept tokens of a batch: what selection returns and every later operation reads."""

from typing import NamedTuple

from torch import Tensor

from dcdit.utils.deprecation import warn_renamed


class TokenSelection(NamedTuple):
    """The kept tokens of a batch, packed image after image in raster order.

    The source is a grid batch (B, L) or packed sequences (S,). In capacity mode the packed buffer has padding: entries
    past ``cu_seqlens[-1]`` have index -1, and the operations write zeros there. :func:`select_tokens` keeps at least
    one token of every non-empty image; the operations also take a hand-made selection with images that keep none.
    """

    indices: Tensor
    """(T,) int64: position of each kept token in the flattened source; -1 in padding entries."""
    cu_seqlens: Tensor
    """(B+1,) int32: where each image starts in the packed buffer."""
    lengths: Tensor
    """(B,) int32: kept tokens per image."""
    max_seqlen: int
    """Upper bound of ``lengths`` (exact where the buffer is sized exactly)."""
    mask: Tensor
    """bool, shape of p: the kept tokens."""
    natural_mask: Tensor
    """bool, shape of p: p above the threshold, before any dropping; the ratio loss reads this."""
    packed_rows: Tensor
    """int32, shape of p: packed row of each kept position, -1 elsewhere (the inverse of ``indices``)."""
    overflow: Tensor
    """() int32: tokens that a capacity forced out."""
    source_cu_seqlens: Tensor | None
    """(B+1,) int32 for a packed source, None for a grid batch."""
    prob_floor: float
    """Lower bound on the p of a kept token that has company (0 for a fixed budget)."""

    @property
    def slots(self) -> Tensor:
        """The former name of ``packed_rows``."""
        warn_renamed("TokenSelection.slots", "TokenSelection.packed_rows")
        return self.packed_rows
