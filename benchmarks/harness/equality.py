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
        error = _distance(a, b)
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
        allowed = max(tolerance, 2 * _distance(given, right)) if given.is_floating_point() else tolerance
        check_equal(f"{what}, result {number}", actual[number : number + 1], [right], allowed)
    if len(actual) != len(plain):
        raise NotEqualError(f"{what}: {len(actual)} results, expected {len(plain)}")


def _distance(a: Tensor, b: Tensor) -> float:
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))
