"""Each operation of :mod:`dcdit.ops` on inputs as a DC-DiT brings them: what tuning and benchmarks run."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcdit import ops
from dcdit.ops import TokenSelection

Call = Callable[[], Tensor | tuple[Any, ...]]


class Shape(NamedTuple):
    """Size of a workload."""

    batch: int
    grid: tuple[int, int]
    width: int
    keep: float
    """Share of the tokens that is kept, on average over images that differ."""
    dtype: torch.dtype
    device: torch.device

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]


class Workload:
    """An operation with its inputs.

    Args:
        op: the operation.
        *args: what it is called with.
        differentiable: the arguments that a training step wants gradients of; empty where there is no backward.
    """

    def __init__(self, op: Callable[..., Any], *args: Any, differentiable: tuple[Tensor, ...] = ()) -> None:
        self.op = op
        self.args = args
        self.differentiable = differentiable

    def forward(self) -> tuple[Tensor, ...]:
        """The outputs."""
        return run_forward(self.call)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """The outputs and the gradients of ``differentiable``, for an output gradient of ones."""
        return run_forward_backward(self.call, self.differentiable)

    def run(self) -> tuple[Tensor, ...]:
        """The outputs, and the gradients where there are any."""
        return self.forward_backward() if self.differentiable else self.forward()

    def call(self) -> Tensor | tuple[Any, ...]:
        return self.op(*self.args)


@torch.no_grad()
def run_forward(call: Call) -> tuple[Tensor, ...]:
    """The tensors that a call returns, without gradients."""
    return _tensors(call())


def run_forward_backward(call: Call, differentiable: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors that a call returns and the gradients of ``differentiable``, for an output gradient of ones."""
    outputs = _tensors(call())
    ones = [torch.ones_like(output) for output in outputs]
    return (*(output.detach() for output in outputs), *torch.autograd.grad(outputs, differentiable, ones))


def _tensors(outputs: Tensor | tuple[Any, ...]) -> tuple[Tensor, ...]:
    if isinstance(outputs, Tensor):
        return (outputs,)
    return tuple(value for value in outputs if isinstance(value, Tensor))


def create_workload(name: str, shape: Shape, seed: int = 0) -> Workload:
    """The workload of one operation.

    Raises:
        ValueError: no such workload.
    """
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; accepted: {', '.join(WORKLOADS)}")
    return WORKLOADS[name](_Inputs(shape, seed))


class _Inputs:
    """Random tensors of a shape; the same for the same seed."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.randn(size, generator=self.generator).to(self.shape.device, dtype or self.shape.dtype)
        return made.requires_grad_()

    def tokens(self) -> Tensor:
        return self.normal(self.shape.batch, self.shape.length, self.shape.width)

    def packed(self, sel: TokenSelection) -> Tensor:
        return self.normal(sel.indices.shape[0], self.shape.width)

    def probabilities(self) -> Tensor:
        """(B, L) float32 in which images keep between half and one and a half times ``keep``."""
        b, keep = self.shape.batch, self.shape.keep
        spread = torch.linspace(0.5, 1.5, b) if b > 1 else torch.ones(b)
        shares = keep * spread.clamp(max=1 / keep)
        uniform = torch.rand(b, self.shape.length, generator=self.generator)
        kept = uniform < shares[:, None]
        p = torch.where(kept, 0.5 + uniform / (2 * shares[:, None]).clamp(min=1e-6), 0.5 * uniform)
        return p.clamp(0, 1).to(self.shape.device).requires_grad_()

    def rows(self) -> Tensor:
        """(B, 6D) adaLN rows, to be cut into column slices as a model does."""
        return self.normal(self.shape.batch, 6 * self.shape.width)


def _boundary_prob_cosine(inputs: _Inputs) -> Workload:
    q, k = inputs.tokens(), inputs.tokens()
    return Workload(ops.boundary_prob_cosine, q, k, None, differentiable=(q, k))


def _boundary_prob_cosine2d(inputs: _Inputs) -> Workload:
    q, k, weight = inputs.tokens(), inputs.tokens(), inputs.normal(inputs.shape.width, 3, 3)
    return Workload(ops.boundary_prob_cosine2d, q, k, weight, inputs.shape.grid, differentiable=(q, k, weight))


def _boundary_prob_predictability(inputs: _Inputs) -> Workload:
    shape, width = inputs.shape, inputs.shape.width // 4
    flat = inputs.normal(shape.batch, *shape.grid, width).detach()
    features = flat.permute(0, 3, 1, 2).requires_grad_()  # channels-last, as the router's convolution leaves it
    affine = [inputs.normal(width) for _ in range(3)]
    bias = inputs.normal(1)
    groups = 8 if width % 8 == 0 else 1
    tensors = (features, *affine, bias)
    return Workload(ops.boundary_prob_predictability, *tensors, groups, 1e-5, differentiable=tensors)


def _select_tokens(inputs: _Inputs) -> Workload:
    p = inputs.probabilities().detach()
    return Workload(ops.select_tokens, p)


def _select_tokens_drop(inputs: _Inputs) -> Workload:
    p = inputs.probabilities().detach()
    return Workload(ops.select_tokens, p, None, 0.5, 0.3, None, p.numel())


def _gather_tokens(inputs: _Inputs) -> Workload:
    x, sel = inputs.tokens(), ops.select_tokens(inputs.probabilities())
    bias = inputs.normal(inputs.shape.length, inputs.shape.width, dtype=torch.float32).detach()
    return Workload(ops.gather_tokens, x, sel, bias, differentiable=(x,))


def _scatter_tokens(inputs: _Inputs) -> Workload:
    sel = ops.select_tokens(inputs.probabilities())
    t = inputs.packed(sel)
    return Workload(ops.scatter_tokens, t, sel, 0.0, differentiable=(t,))


def _dechunk_spatial(inputs: _Inputs) -> Workload:
    p = inputs.probabilities()
    sel = ops.select_tokens(p)
    h, residual = inputs.packed(sel), inputs.tokens()
    gate = torch.maximum(p, 1 - p).detach().requires_grad_()
    args = (h, p, sel, inputs.shape.grid, 1.0, gate, residual)
    return Workload(ops.dechunk_spatial, *args, differentiable=(h, p, gate, residual))


def _dechunk_ema(inputs: _Inputs) -> Workload:
    p = inputs.probabilities()
    sel = ops.select_tokens(p)
    h, residual = inputs.packed(sel), inputs.tokens()
    gate = torch.maximum(p, 1 - p).detach().requires_grad_()
    return Workload(ops.dechunk_ema, h, p, sel, gate, residual, differentiable=(h, p, gate, residual))


def _ratio_loss(inputs: _Inputs) -> Workload:
    p = inputs.probabilities()
    natural = p.detach() > 0.5
    return Workload(ops.ratio_loss, p, natural, 4.0, differentiable=(p,))


def _modulated_layer_norm(inputs: _Inputs) -> Workload:
    sel = ops.select_tokens(inputs.probabilities())
    t, rows = inputs.packed(sel), inputs.rows()
    shift, scale, *_ = rows.chunk(6, dim=1)
    return Workload(ops.modulated_layer_norm, t, shift, scale, sel.cu_seqlens, differentiable=(t, shift, scale))


def _gated_add(inputs: _Inputs) -> Workload:
    sel = ops.select_tokens(inputs.probabilities())
    x, y, rows = inputs.packed(sel), inputs.packed(sel), inputs.rows()
    gate = rows.chunk(6, dim=1)[2]
    return Workload(ops.gated_add, x, y, gate, sel.cu_seqlens, differentiable=(x, y, gate))


def _gated_add_modulated_layer_norm(inputs: _Inputs) -> Workload:
    sel = ops.select_tokens(inputs.probabilities())
    x, y, rows = inputs.packed(sel), inputs.packed(sel), inputs.rows()
    shift, scale, gate, *_ = rows.chunk(6, dim=1)
    tensors = (x, y, gate, shift, scale)
    return Workload(ops.gated_add_modulated_layer_norm, *tensors, sel.cu_seqlens, differentiable=tensors)


WORKLOADS: dict[str, Callable[[_Inputs], Workload]] = {
    "boundary_prob_cosine": _boundary_prob_cosine,
    "boundary_prob_cosine2d": _boundary_prob_cosine2d,
    "boundary_prob_predictability": _boundary_prob_predictability,
    "select_tokens": _select_tokens,
    "select_tokens_drop": _select_tokens_drop,
    "gather_tokens": _gather_tokens,
    "scatter_tokens": _scatter_tokens,
    "dechunk_spatial": _dechunk_spatial,
    "dechunk_ema": _dechunk_ema,
    "ratio_loss": _ratio_loss,
    "modulated_layer_norm": _modulated_layer_norm,
    "gated_add": _gated_add,
    "gated_add_modulated_layer_norm": _gated_add_modulated_layer_norm,
}
