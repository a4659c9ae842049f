"""A side is only timed after it computed what the others compute."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dcdit.ops import TokenSelection

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""What two orders of summation may differ by."""


class NotEqualError(AssertionError):
    """A side computed something else; its time would mean nothing."""


def check_equal(what: str, actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Compare results pairwise: float tensors within a relative tolerance in the 2-norm, everything else exactly.

    Raises:
        NotEqualError: naming the side and the result that differs.
    """
    if len(actual) != len(expected):
        raise NotEqualError(f"{what}: {len(actual)} results, expected {len(expected)}")
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if a.shape != b.shape:
            raise NotEqualError(f"{what}: result {number} has shape {tuple(a.shape)}, expected {tuple(b.shape)}")
        error = _distance(a, b)
        if not error <= tolerance:  # NaN fails
            raise NotEqualError(f"{what}: result {number} is off by {error:.1e}, allowed {tolerance:.0e}")


def comparable(sel: TokenSelection | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A selection, ours or the plain one: mask, natural mask, lengths, cu_seqlens, kept positions in packed order."""
    if isinstance(sel, TokenSelection):
        kept = sel.indices[sel.indices >= 0]
        return sel.mask, sel.natural_mask, sel.lengths.long(), sel.cu_seqlens, kept
    mask, natural, lengths, cu_seqlens, order, real = sel
    start = torch.arange(mask.shape[0], device=mask.device)[:, None] * mask.shape[1]
    return mask, natural, lengths, cu_seqlens, (order + start)[real]


def _distance(a: Tensor, b: Tensor) -> float:
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))
