"""The clamped probability of each kept token."""

import torch
from torch import Tensor

from dcdit.ops._torch.packing import gather_tokens
from dcdit.ops.numerics import PROB_EPS, upcast
from dcdit.ops.token_selection import TokenSelection


def packed_clamped_prob(p: Tensor, sel: TokenSelection, dtype: torch.dtype) -> Tensor:
    """(T,): ``clamp(p, 1e-4, 1 - 1e-4)`` of the kept tokens, 0 in padding rows."""
    clamped = upcast(p).clamp(PROB_EPS, 1 - PROB_EPS).to(dtype)
    return gather_tokens(clamped[..., None], sel, None).squeeze(1)
