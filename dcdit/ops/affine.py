"""The weight and bias of a norm, as part of its modulation: whatever a backend does for the tables serves them too."""

from torch import Tensor

from dcdit.ops.numerics import upcast_all


def fold_affine(
    shift: Tensor | None, scale: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Offset and factor (B, D), upcast, with ``x * factor + offset = (x * weight + bias) * (1 + scale) + shift``.

    Args:
        shift, scale: (B, D); no shift is a shift of zeros.
        weight, bias: (D,), each may be missing.
    """
    found = iter(upcast_all(*(x for x in (shift, scale, weight, bias) if x is not None)))
    offset = None if shift is None else next(found)
    factor = 1 + next(found)
    whole = factor if weight is None else factor * next(found)
    if bias is not None:
        added = next(found) * factor
        offset = added if offset is None else offset + added
    return offset, whole
