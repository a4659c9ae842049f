"""The kept tokens of a batch: what selection returns and every later operation reads."""

from typing import NamedTuple

from torch import Tensor

from dcdit.utils.cuda import PendingRead
from dcdit.utils.deprecation import warn_renamed


class TokenSelection(NamedTuple):
    """The kept tokens of a batch, packed image after image, in raster order inside an image.

    The source is a grid batch (B, L) or packed sequences (S,). A packed buffer of a given capacity ends in padding
    rows, past ``cu_seqlens[-1]``: their index is -1, and the operations write zeros there. :func:`select_tokens` keeps
    at least one token of every non-empty image. The operations also accept a hand-made selection in which an image
    keeps none.
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
    """bool, shape of p: the kept positions."""
    natural_mask: Tensor
    """bool, shape of p: p above the threshold, before any token is dropped. The ratio loss reads it."""
    packed_rows: Tensor
    """int32, shape of p: packed row of each kept position, -1 elsewhere (the inverse of ``indices``)."""
    overflow: Tensor
    """() int32: how many tokens were dropped because the capacity was too small."""
    source_cu_seqlens: Tensor | None
    """(B+1,) int32: where each sequence of a packed source starts; None for a grid batch."""
    prob_floor: float
    """Lower bound on the p of each kept token of an image that keeps several; 0 for a budget."""

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

    def wait(self) -> TokenSelection:
        """The selection, as :func:`dcdit.ops.select_tokens` returns it."""
        if self.sizes is None:
            return self.selection
        total, longest = self.sizes.wait()
        return self.selection._replace(indices=self.selection.indices[:total], max_seqlen=longest)
