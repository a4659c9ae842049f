"""The identity as the first value of a weight."""

import torch
from torch import Tensor


@torch.no_grad()
def set_to_identity(weight: Tensor) -> None:
    """Write the identity into a square weight, in place.

    Not ``nn.init.eye_``: that writes the whole identity into each shard of a sharded weight.
    """
    weight.copy_(torch.ones_like(weight).tril().triu())
