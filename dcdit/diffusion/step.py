"""The step of a sampler: guidance, drop schedule, model, update and noise, as work on tensors that stay in place."""

from typing import NamedTuple

import torch
from torch import Tensor

from dcdit.diffusion.guidance import Guided, Seen
from dcdit.diffusion.noise import ImageNoise
from dcdit.diffusion.samplers import Chain

Branches = tuple[bool, ...]
"""Of each model call of a step: whether it computes both branches of guidance."""


class Taken(NamedTuple):
    """What a step gives."""

    x: Tensor
    """(B, C, H, W), the state after it."""
    x0: Tensor
    """(B, C, H, W), the clean data that the model expects."""
    seen: list[Seen]
    """What the model says about its calls."""
    overflow: Tensor
    """() int64: tokens that a capacity dropped so far."""


class SamplerStep:
    """One step of a run. A call is the next step.

    What changes from step to step is read on the device, by the number of the step, which is counted there. So a CUDA
    graph of a call is a step of the run at every replay. Only the branches of guidance change the work itself.

    Args:
        chain: the sampler.
        guided: the model with labels, guidance and budget.
        noise: of the images.
        dtype: of x.
    """

    def __init__(self, chain: Chain, guided: Guided, noise: ImageNoise, dtype: torch.dtype) -> None:
        device = guided.labels.device
        self.guided, self._chain, self._noise, self._dtype = guided, chain, noise, dtype
        # Steps of the training schedule stay integers, as a model may use them as an index.
        whole = isinstance(chain.times[0][0], int)
        self._times = torch.tensor(chain.times, dtype=torch.int64 if whole else torch.float32, device=device)
        self._coefficients = torch.tensor(chain.coefficients, dtype=dtype, device=device)
        self.branches: list[Branches] = [tuple(guided.both(t) for t in times) for times in chain.times]
        """Of each step."""
        times_of: dict[bool, list[float]] = {}
        for t in (t for times in chain.times for t in times):
            times_of.setdefault(guided.both(t), []).append(t)
        self._fractions = {both: self._fractions_of(both) for both in sorted(times_of)}
        self._sizes = {both: guided.sizes(both, times) for both, times in sorted(times_of.items())}
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        """() int64: steps done."""
        self.overflow = torch.zeros((), dtype=torch.int64, device=device)
        """() int64: tokens that a capacity dropped so far."""
        self.x = noise(self.number)
        """(B, C, H, W), the state."""

    def __call__(self, branches: Branches) -> Taken:
        """The next step."""
        row = self.number.view(1)
        times = self._times.index_select(0, row)[0].unbind()
        seen: list[Seen] = []

        def predict(x: Tensor, call: int) -> Tensor:
            rho = self._fractions[branches[call]]
            if isinstance(rho, Tensor):
                rho = rho[:, call].index_select(0, row)[0]
            out, noted = self.guided.call(x, times[call], branches[call], rho, self._sizes[branches[call]])
            seen.extend([] if noted is None else [noted])
            if noted is not None and "overflow" in noted:
                self.overflow.add_(noted["overflow"])
            return out.to(self._dtype)

        coefficients = self._coefficients.index_select(0, row)[0].unbind()
        x, x0 = self._chain.update(predict, self.x, coefficients, lambda: self._noise(self.number + 1))
        self.x.copy_(x)
        self.number.add_(1)
        return Taken(x, x0, seen, self.overflow)

    @property
    def method(self) -> str:
        return self._chain.name[0]

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a call changes."""
        return self.x, self.number, self.overflow

    def tensors(self) -> list[Tensor]:
        """What a call reads and writes, apart from the model's weights."""
        tables = [rho for rho in self._fractions.values() if isinstance(rho, Tensor)]
        noise = [self._noise.seed, self._noise.images]
        return [*self.state, self._times, self._coefficients, self.guided.labels, *noise, *tables]

    def work(self) -> tuple[object, ...]:
        """Two steps with equal work on tensors of equal shapes do the same to them."""
        guided = self.guided
        numbers = [(both, None if isinstance(rho, Tensor) else rho) for both, rho in self._fractions.items()]
        shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in self.tensors()]
        sizes = [(both, *sorted(options.items())) for both, options in self._sizes.items()]
        return (self._chain.name, self._dtype, guided.scale, guided.channels, *sizes, tuple(numbers), tuple(shapes))

    def _fractions_of(self, both: bool) -> float | Tensor | None:
        """The drop fraction of calls with or without the null branch: a constant number, or (steps, calls, rows)."""
        table = [[self.guided.fractions(t, both) for t in times] for times in self._chain.times]
        if not isinstance(table[0][0], Tensor):
            return table[0][0]
        return torch.stack([torch.stack(row) for row in table])  # type: ignore[arg-type]
