"""Exponential moving average of a model's weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class EMA:
    """``average <- decay * average + (1 - decay) * weight`` after every step, beginning with the initial weights.

    Args:
        model: the model whose weights are averaged. Its buffers are copied once.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        # The parameters, not their data: wrapping the model for distributed training gives them other storage.
        self._weights: list[Tensor] = [parameter for _, parameter in model.named_parameters()]
        self._averages = [self.state[name] for name, _ in model.named_parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Include the current weights of the model."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a stored average with the same names."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
