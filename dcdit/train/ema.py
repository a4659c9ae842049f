"""Exponential moving average of a model's weights."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dcdit.train.sharding import divided, local


class EMA:
    """``average <- decay * average + (1 - decay) * weight`` after every step, beginning with the initial weights.

    Args:
        model: the model whose weights are averaged. Its buffers are copied once. Where its parameters are divided over
            processes, the averages are too.
        decay: in [0, 1).

    Example:
        >>> import torch
        >>> from dcdit.train import EMA
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 1.0)
        >>> ema = EMA(model, decay=0.9)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> ema.update()
        >>> with ema.as_weights():
        ...     print(round(model.weight.item(), 4))  # 0.9 * 1 + 0.1 * 2
        1.1
        >>> model.weight.item()
        2.0
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
        averages, weights = ([local(tensor) for tensor in tensors] for tensors in (self._averages, self._weights))
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a stored average with the same names."""
        for name, tensor in self.state.items():
            tensor.copy_(divided(state[name], tensor))

    @contextlib.contextmanager
    def as_weights(self) -> Iterator[None]:
        """Inside the block the model has the averages as its weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for pair in zip(self._weights, self._averages, strict=True):
            weight, average = map(local, pair)
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
