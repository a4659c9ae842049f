"""Values as error messages spell them."""

from torch import Tensor


def shape_of(tensor: Tensor) -> str:
    """``(2, 16, 64)``; also under ``torch.compile``, where a size may be symbolic."""
    return "(" + ", ".join(str(size) for size in tensor.shape) + ")"
