"""What the registry is made of: operations, the cases in which they are called, and a case ready to run."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcdit import ops
from dcdit.ops import TokenSelection

Arguments = dict[str, Any]
Call = Callable[[], Tensor | tuple[Any, ...]]
DEFAULT = "default"


class Shape(NamedTuple):
    """Size of a workload."""

    batch: int
    grid: tuple[int, int]
    width: int
    keep: float
    """Fraction of the tokens that is kept, on average over images that differ."""
    dtype: torch.dtype
    device: torch.device

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]


class Inputs:
    """Random differentiable tensors of a shape; the same for the same seed."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.randn(size, generator=self.generator, device="cpu")
        return made.to(self.shape.device, dtype or self.shape.dtype).requires_grad_()

    def tokens(self) -> Tensor:
        """(B, L, D), a grid batch."""
        return self.normal(self.shape.batch, self.shape.length, self.shape.width)

    def source_rows(self) -> Tensor:
        """(S, D) with S = B * L, a packed source."""
        return self.normal(self.shape.batch * self.shape.length, self.shape.width)

    def packed(self, sel: TokenSelection) -> Tensor:
        """(T, D), the kept tokens."""
        return self.normal(sel.indices.shape[0], self.shape.width)

    def table(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Six (B, D) column slices of one (B, 6D) tensor, as a model cuts its adaLN rows."""
        return self.normal(self.shape.batch, 6 * self.shape.width, dtype=dtype).chunk(6, dim=1)

    def probabilities(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, L) in which images keep between half and one and a half times ``keep``."""
        b, keep = self.shape.batch, self.shape.keep
        spread = torch.linspace(0.5, 1.5, b, device="cpu") if b > 1 else torch.ones(b, device="cpu")
        fraction = (keep * spread.clamp(max=1 / keep))[:, None]
        uniform = torch.rand(b, self.shape.length, generator=self.generator, device="cpu")
        p = torch.where(uniform < fraction, 0.5 + uniform / (2 * fraction).clamp(min=1e-6), 0.5 * uniform)
        return p.clamp(0, 1).to(self.shape.device, dtype).requires_grad_()

    def packed_probabilities(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(S,), the same for a packed source."""
        return self.probabilities(dtype).detach().flatten().requires_grad_()

    def source_cu_seqlens(self) -> Tensor:
        """int32 (B+1,), where the sequences of a packed source start; later ones are longer."""
        starts = torch.linspace(0, 1, self.shape.batch + 1, device="cpu") ** 1.5
        return (starts * (self.shape.batch * self.shape.length)).round().to(self.shape.device, torch.int32)

    def selection(self) -> TokenSelection:
        """Of a grid batch, sized exactly."""
        return ops.select_tokens(self.probabilities())

    def packed_selection(self) -> TokenSelection:
        """Of a packed source, sized exactly."""
        return ops.select_tokens(self.packed_probabilities(), self.source_cu_seqlens())

    def padded_selection(self) -> TokenSelection:
        """Of a grid batch, with a capacity above the kept count: the last packed rows are padding."""
        return ops.select_tokens(self.probabilities(), capacity=self.shape.batch * self.shape.length)


class Case(NamedTuple):
    """One way to call an operation."""

    arguments: Callable[[Inputs], Arguments]
    """Makes the arguments, by name."""
    gradients: tuple[str, ...] | None = None
    """Arguments whose gradients are wanted; None wants those of every tensor that ``arguments`` made differentiable."""
    outputs: tuple[int, ...] | None = None
    """Numbers of the outputs that are used; None uses all. An output that nobody uses gets no gradient."""
    timed: bool = False
    """Benchmarks time it beside the default case."""


@dataclass(frozen=True)
class Operation:
    """What benchmarks, tuning, checks and tests know of one operation of :mod:`dcdit.ops`."""

    op: Callable[..., Any]
    plain: Callable[..., Call]
    """The published formulation in plain PyTorch: takes the arguments of a timed case, prepares what an implementation
    would have at hand by then, and returns the call to time."""
    cases: Mapping[str, Case]
    """Cases by name. ``default`` is how a DC-DiT calls it. All are tested, and compiled for every GPU."""
    forward_reads: tuple[str, ...]
    """Arguments that a forward must read. Outputs and the indices of a selection always count and are not named."""
    forward_reads_kept: tuple[str, ...] = ()
    """Arguments of which a forward must read only the rows at kept positions."""
    backward_reads: tuple[str, ...] = ()
    """Arguments that a backward must read, beside the gradients of the outputs."""
    backward_writes: tuple[str, ...] = ()
    """Arguments whose gradients a backward must write. A summand is not among them: its gradient is that of the sum."""
    flops: Callable[..., int] | None = None
    """FLOPs of the forward, from the arguments; None where memory is the limit and not arithmetic."""
    comparable: Callable[[Any], tuple[Tensor, ...]] | None = None
    """Turns results of the operation and of its plain formulation into tensors to compare; None: they are tensors."""

    @property
    def name(self) -> str:
        return self.op.__name__

    @property
    def differentiable(self) -> bool:
        """Whether it has a backward."""
        return bool(self.backward_writes)

    def workload_name(self, case: str) -> str:
        """The name of a case for :func:`dcdit.profiling.workloads.create_workload`."""
        return self.name if case == DEFAULT else f"{self.name}_{case}"


class Workload:
    """An operation with the arguments of one of its cases.

    Args:
        operation: the operation.
        case: the case.
        inputs: where the arguments come from.
    """

    def __init__(self, operation: Operation, case: Case, inputs: Inputs) -> None:
        wanted = case.gradients if operation.differentiable else ()
        self.operation = operation
        self.arguments = {
            name: value if wanted is None or name in wanted else _detached(value)
            for name, value in case.arguments(inputs).items()
        }
        self._outputs = case.outputs

    def copy(self) -> "Workload":
        """The same on other memory: the same values, strides included."""
        made = copy.copy(self)
        made.arguments = {name: _copied(value) for name, value in self.arguments.items()}
        return made

    def double(self) -> "Workload":
        """The same in float64: the same values, floats with more digits."""
        made = copy.copy(self)
        made.arguments = {name: _doubled(value) for name, value in self.arguments.items()}
        return made

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        """The arguments whose gradients are wanted; empty without a backward."""
        return tuple(a for a in self.arguments.values() if isinstance(a, Tensor) and a.requires_grad)

    def call(self) -> Tensor | tuple[Any, ...]:
        """The outputs that are used, as the operation returns them."""
        return self.used(self.operation.op(**self.arguments))

    def used(self, result: Any) -> Any:
        """The outputs that are used, of what the operation or its definition returns."""
        return result if self._outputs is None else tuple(result[number] for number in self._outputs)

    def plain(self) -> Call:
        """The plain formulation on the same arguments."""
        return self.operation.plain(**self.arguments)

    def forward(self) -> tuple[Tensor, ...]:
        """The outputs."""
        return run_forward(self.call)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """The outputs and the gradients of ``differentiable``, for an output gradient of ones."""
        return run_forward_backward(self.call, self.differentiable)

    def run(self) -> tuple[Tensor, ...]:
        """The outputs, and the gradients where there are any."""
        return self.forward_backward() if self.differentiable else self.forward()


@torch.no_grad()
def run_forward(call: Call) -> tuple[Tensor, ...]:
    """The tensors that a call returns, without gradients."""
    return tensors_of(call())


def run_forward_backward(call: Call, differentiable: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors that a call returns and the gradients of ``differentiable``, for an output gradient of ones."""
    outputs = tensors_of(call())
    ones = [torch.ones_like(output) for output in outputs]
    return (*(output.detach() for output in outputs), *torch.autograd.grad(outputs, differentiable, ones))


def tensors_of(outputs: Tensor | tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The tensors among the outputs of an operation."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    return tuple(value for value in outputs if isinstance(value, Tensor))


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        # The columns of a table of adaLN rows stay columns of a table: rows that lie apart are read apart.
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return made.copy_(value.detach()).requires_grad_(value.requires_grad)
    if isinstance(value, TokenSelection):
        return TokenSelection(*(_copied(part) for part in value))
    return value


def _doubled(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value
