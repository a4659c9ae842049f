"""A variant is timed only after it computed what the others compute."""

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""How far two orders of summation may differ."""


class NotEqualError(AssertionError):
    """A variant computed something else; its time would mean nothing."""


def check_equal(what: str, actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Compare results pairwise: float tensors within a relative tolerance in the 2-norm, everything else exactly.

    Raises:
        NotEqualError: a result differs; names the variant and the result.
    """
    if len(actual) != len(expected):
        raise NotEqualError(f"{what}: {len(actual)} results, expected {len(expected)}")
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if a.shape != b.shape:
            raise NotEqualError(f"{what}: result {number} has shape {tuple(a.shape)}, expected {tuple(b.shape)}")
        error = distance(a, b)
        if not error <= tolerance:  # NaN fails
            raise NotEqualError(f"{what}: result {number} is off by {error:.1e}, allowed {tolerance:.0e}")


def check_accurate(
    what: str, actual: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float
) -> None:
    """Compare results with those of the plain formulation in float64.

    Each may be off by the tolerance, or by twice what the plain formulation is off in the dtype of the inputs: its sums
    over thousands of rows in bfloat16 keep few digits. What is no float must equal the plain result.

    Raises:
        NotEqualError: a result differs; names the variant and the result.
    """
    for number, (right, given) in enumerate(zip(exact, plain, strict=True)):
        allowed = max(tolerance, 2 * distance(given, right)) if given.is_floating_point() else tolerance
        check_equal(f"{what}, result {number}", actual[number : number + 1], [right], allowed)
    if len(actual) != len(plain):
        raise NotEqualError(f"{what}: {len(actual)} results, expected {len(plain)}")


def check_kept(
    what: str, prob: Tensor, mask: Tensor, right_prob: Tensor, right_mask: Tensor, tolerance: float
) -> Tensor:
    """Compare the kept tokens of two sides whose probabilities differ by rounding.

    A token may be kept by one side alone only where its probability is as near to the cut as the two sides differ: the
    cut lies between the best token that an image drops and the worst that it keeps.

    Returns:
        (B,) bool: the images that keep the same tokens on both sides. Only their outputs can be compared.

    Raises:
        NotEqualError: the probabilities differ by more than the tolerance, a token away from the cut is kept by one
            side alone, or no image keeps the same tokens.
    """
    off = float((prob.double() - right_prob.double()).abs().max())
    if not off <= tolerance:
        raise NotEqualError(f"{what}: probabilities are off by {off:.1e}, allowed {tolerance:.0e}")
    best_dropped = right_prob.masked_fill(right_mask, -torch.inf).amax(1, keepdim=True)
    worst_kept = right_prob.masked_fill(~right_mask, torch.inf).amin(1, keepdim=True)
    near = (right_prob >= best_dropped - 2 * off) & (right_prob <= worst_kept + 2 * off)
    flipped = mask != right_mask
    if wrong := int((flipped & ~near).sum()):
        raise NotEqualError(f"{what}: {wrong} tokens away from the cut are kept by one side alone")
    same = ~flipped.any(1)
    if not same.any():
        raise NotEqualError(f"{what}: no image keeps the same tokens, of {len(same)}")
    return same


def distance(a: Tensor, b: Tensor) -> float:
    """Of float tensors relative, in the 2-norm; of others 0 or infinite."""
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))
