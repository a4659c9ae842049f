"""How error messages write values."""

from torch import Tensor


def shape_of(tensor: Tensor) -> str:
    """A shape as ``(2, 16, 64)``. Works under ``torch.compile`` too, where a size may be symbolic."""
    return "(" + ", ".join(str(size) for size in tensor.shape) + ")"
