"""Finding numbers that are not finite."""

from collections.abc import Mapping

from torch import Tensor


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; None if there is none. Waits for the device."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
