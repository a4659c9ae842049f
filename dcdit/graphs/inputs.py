"""What a captured forward pass reads."""

import torch
from torch import Tensor

from dcdit.models import DCDiT, DiT, DyDiT, SparseDiT
from dcdit.models.inputs import check_inputs
from dcdit.ops.selection import check_drop_fraction


class ForwardInputs:
    """The inputs of a forward pass in memory of their own, to which every call copies its own.

    Args:
        model: that is captured.
        images: of a batch.
    """

    def __init__(self, model: DCDiT | DiT | DyDiT | SparseDiT, images: int) -> None:
        self._config, weight = model.config, next(model.parameters())
        # A tensor that is made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            shape = (images, self._config.in_channels, *self._config.grid)
            self.x = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            self.t = torch.zeros(images, dtype=torch.float32, device=weight.device)
            self.y = torch.zeros(images, dtype=torch.int64, device=weight.device)
            self.drop = torch.zeros(images, dtype=torch.float32, device=weight.device)

    def copy(self, x: Tensor, t: Tensor, y: Tensor, drop: float | Tensor) -> None:
        """Take those of a call.

        Raises:
            ValueError: what the model itself would refuse. A copy would repeat or round it without a word.
        """
        check_inputs(self._config, x, t, y)
        drop = check_drop_fraction(drop, len(x), self.x)
        self.x.copy_(x)
        self.t.copy_(t)
        self.y.copy_(y)
        self.drop.copy_(drop) if isinstance(drop, Tensor) else self.drop.fill_(drop)
