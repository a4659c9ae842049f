"""Whether the numbers of a backend are right, beside those of the float64 definition.

An error is small if it is at most ``ULPS`` units in the last place of the largest number of a result. Where terms
cancel, a result is small beside them, and this asks too much. Then the error may also be ``SAFETY`` times the larger of
two others: that of the definition itself in the dtypes of the arguments, and what happens to the exact result when all
inputs and cotangents move by half a unit in the last place.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dcdit import ops
from dcdit.ops.numerics import NORM_EPS
from tools.soak.random_calls import Call

ULPS = 8
SAFETY = {"torch": 4, "triton": 8}
"""By backend. Triton's interpreter truncates to bfloat16, and so is up to twice as wrong as one that rounds."""


def error_over_allowed(call: Call, backend: str) -> float:
    """The largest error of outputs and gradients, divided by what is allowed; infinite for another fault.

    A selection must be equal. Where the definition raises, the backend must raise the same.
    """
    expected, found = _results(call, "reference"), _results(call, backend)
    if isinstance(expected, Exception) or isinstance(found, Exception):
        return 0.0 if repr(expected) == repr(found) else float("inf")
    if call.op is ops.select_tokens:
        return 0.0 if all(map(_equal, found, expected)) else float("inf")
    exact, terms = _results(_in_float64(call), "reference"), _terms(call)
    moved: list[list[Tensor]] = []
    worst = 0.0
    for i, (value, same, truth) in enumerate(zip(found, expected, exact, strict=True)):
        if value.shape != same.shape or value.dtype != same.dtype:
            return float("inf")
        if value.numel() == 0:
            continue
        unit = ULPS * max(torch.finfo(value.dtype).eps, 2 * _half_ulp(call))
        allowed = unit * max(_largest(_finite(truth.to(value.dtype))), terms.get(i, 0.0))
        error = _largest(_difference(value, truth))
        if not error <= allowed:  # also if it is NaN
            moved = moved or [_moved(call, seed) for seed in range(2)]
            estimates = [_difference(same, truth), *(other[i] - truth for other in moved)]
            allowed += SAFETY[backend] * max(_largest(_finite(estimate)) for estimate in estimates)
        if error != error or error > allowed == 0:
            return float("inf")
        worst = max(worst, error / allowed if allowed else 0.0)
    return worst


def _results(call: Call, backend: str, move: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
    """Outputs and gradients (of a selection, its fields), or the error."""
    with ops.use_backend(backend):
        try:
            if call.op is ops.select_tokens:
                return list(call.op(*call.args))
            return _differentiate(call, move)
        except Exception as error:
            return error


def _differentiate(call: Call, move: Callable[[Tensor], Tensor]) -> list[Tensor]:
    args = [move(a.detach()).requires_grad_() if _is_float(a) else a for a in call.args]
    made = call.op(*args)
    outputs = list(made) if isinstance(made, tuple) else [made]
    grads = torch.autograd.grad(outputs, _floats(args), [move(_cotangent(x)) for x in outputs])
    return [*(x.detach() for x in outputs), *grads]


def _cotangent(output: Tensor) -> Tensor:
    """Random numbers that every dtype holds."""
    normal = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    return ((16 * normal).round() / 16).to(output.dtype)


def _in_float64(call: Call) -> Call:
    return Call(call.op, tuple(a.double() if _is_float(a) else a for a in call.args))


def _moved(call: Call, seed: int) -> list[Tensor]:
    """The exact results where every input and every cotangent is moved by at most half an ulp, at random."""
    generator, half_ulp = torch.Generator().manual_seed(seed), _half_ulp(call)

    def move(x: Tensor) -> Tensor:
        return x * (1 + half_ulp * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1))

    return _results(_in_float64(call), "reference", move)


def _half_ulp(call: Call) -> float:
    """Of the dtype in which a backend computes: float32, unless all is float64. Attention rounds to its own dtype."""
    dtypes = {a.dtype for a in _floats(call.args)}
    if call.op is ops.varlen_attention and torch.float32 not in dtypes and len(dtypes) == 1:
        return torch.finfo(*dtypes).eps / 2
    return torch.finfo(torch.float64 if dtypes == {torch.float64} else torch.float32).eps / 2


def _terms(call: Call) -> dict[int, float]:
    """Where terms cancel exactly, so that no estimate shows their size: the size, by the number of the result."""
    if call.op in (ops.boundary_prob_cosine, ops.boundary_prob_cosine2d):
        # The gradient of a row of one channel.
        norms = [torch.linalg.vector_norm(x.double(), dim=-1).clamp(min=NORM_EPS) for x in call.args[:2]]
        return {1 + i: float((1 / norm).max()) if norm.numel() else 0.0 for i, norm in enumerate(norms)}
    if call.op in (ops.dechunk_ema, ops.dechunk_spatial):
        # The gradient of p is the product with h minus its average.
        h = call.args[0].double().nan_to_num()
        return {2: _largest(h) * h.shape[1]}
    if call.op is ops.varlen_attention:
        # The scores have no gradient where all keys or all values are equal.
        q, k, v = (x.double().nan_to_num() for x in call.args[:3])
        of_scores = _largest(v) * q.shape[2] ** 0.5
        return {1: _largest(k) * of_scores, 2: _largest(q) * of_scores}
    return {}


def _difference(value: Tensor, truth: Tensor) -> Tensor:
    """Zero where the truth is out of the range of the dtype, and the value is infinite accordingly."""
    return torch.where(value == truth.to(value.dtype), 0.0, value.double() - truth)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _floats(args: Any) -> list[Tensor]:
    return [a for a in args if _is_float(a)]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a is b or a == b


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
