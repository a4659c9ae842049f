"""Whether the numbers of a backend are right, beside those of the float64 definition.

An error is small if it is at most ``ULPS`` units in the last place of the largest number of a result. Where terms
cancel, a result is small beside them, and this asks too much. Then the error may also be ``SAFETY`` times the largest
of these: the errors of the definition itself, in the dtypes of the arguments, and in the dtype in which a backend
computes when all inputs and cotangents move by half a unit in its last place. Inputs that are moved are rounded
otherwise, so the moves show what rounding does to a result.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dcdit import ops
from dcdit.ops.numerics import NORM_EPS
from tools.soak.random_calls import Call, strided

COSINES = (ops.boundary_prob_cosine, ops.boundary_prob_cosine2d)
SELECTIONS = (ops.select_tokens, ops.select_from_mask)
ULPS = 8
SAFETY = {"torch": 4, "triton": 8}
"""By backend. Triton's interpreter truncates to bfloat16, and so is up to twice as wrong as one that rounds."""
GROUP_NORM_EPS = 1e-5
LARGEST_COTANGENT = 3
"""About that, of some hundred normal numbers."""
MOVES = (2, 20)
"""How often the inputs are moved. By chance the result, if it is one number, hardly moves in the first of them."""


def error_over_allowed(call: Call, backend: str) -> float:
    """The largest error of outputs and gradients, divided by what is allowed; infinite for another fault.

    A selection must be equal, and so must rows that are only moved. Where the definition raises, the backend must raise
    the same.
    """
    plain = call._replace(autocast=False)
    expected, found = _results(plain, "reference"), _results(call, backend)
    if isinstance(expected, Exception) or isinstance(found, Exception):
        return 0.0 if repr(expected) == repr(found) else float("inf")
    if call.op in SELECTIONS or not all(map(_same_kind, found, expected)):
        return 0.0 if all(map(_equal, found, expected)) else float("inf")
    exact = _results(_in(torch.float64, plain), "reference")
    sizes, terms, moved_rows = _sizes(call), _terms(call, exact), _moved_rows(call)
    moved: list[list[Tensor]] = []
    worst = 0.0
    for i, (value, same, truth) in enumerate(zip(found, expected, exact, strict=True)):
        if value is None or value.numel() == 0:
            continue
        if i in moved_rows and not torch.equal(value, same):
            return float("inf")
        if not value.is_floating_point():
            continue
        size = sizes.get(i, 1.0)
        unit = ULPS * max(torch.finfo(value.dtype).eps, 2 * _half_ulp(call))
        allowed = unit * max(_largest(size * _finite(truth.to(value.dtype))), terms.get(i, 0.0))
        error = _largest(size * _difference(value, truth))
        small = allowed
        for count in MOVES:
            if error <= allowed or error != error:
                break
            moved += [_moved(plain, seed) for seed in range(len(moved), count)]
            estimates = [_difference(same, truth), *(_difference(other[i], truth) for other in moved)]
            allowed = small + SAFETY[backend] * max(_largest(size * _finite(estimate)) for estimate in estimates)
        if error != error or error > allowed == 0:
            return float("inf")
        worst = max(worst, error / allowed if allowed else 0.0)
    return worst


def _results(call: Call, backend: str, move: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
    """Outputs and gradients (of a selection, its fields), or the error. A gradient that is not wanted is None."""
    with ops.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=call.autocast):
        try:
            if call.op in SELECTIONS:
                sel = call.op(*call.args)
                return [*sel[:-1], *(sel.grid_selection or ())]
            return _differentiate(call, move)
        except Exception as error:
            return error


def _differentiate(call: Call, move: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    args = [
        move(a.detach()).requires_grad_(i not in call.without_gradient) if _is_float(a) else a
        for i, a in enumerate(call.args)
    ]
    made = call.op(*args)
    outputs = list(made) if isinstance(made, tuple) else [made]
    wanted = [a for a in _floats(args) if a.requires_grad]
    with torch.autocast("cpu", enabled=False):
        flows = [(x, move(strided(_cotangent(x), call.cotangents))) for x in outputs if x.requires_grad]
    grads = iter(torch.autograd.grad([x for x, _ in flows], wanted, [g for _, g in flows]) if wanted else ())
    return [*(x.detach() for x in outputs), *(next(grads) if a.requires_grad else None for a in _floats(args))]


def _cotangent(output: Tensor) -> Tensor:
    """Random numbers that every dtype holds."""
    normal = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    return ((16 * normal).round() / 16).to(output.dtype)


def _in(dtype: torch.dtype, call: Call) -> Call:
    return call._replace(args=tuple(a.to(dtype) if _is_float(a) else a for a in call.args))


def _moved(call: Call, seed: int) -> list[Tensor]:
    """The definition where every input and every cotangent is moved by about half an ulp, at random."""
    generator, half_ulp = torch.Generator().manual_seed(seed), _half_ulp(call)

    def move(x: Tensor) -> Tensor:
        factor = 1 + half_ulp * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1)
        return (x * factor).to(x.dtype)

    return _results(_in(_accumulation_dtype(call), call), "reference", move)


def _half_ulp(call: Call) -> float:
    """Of the dtype in which a backend computes. Attention rounds to its own dtype."""
    dtypes = {a.dtype for a in _floats(call.args)}
    if call.op is ops.varlen_attention and torch.float32 not in dtypes and len(dtypes) == 1:
        return torch.finfo(*dtypes).eps / 2
    return torch.finfo(_accumulation_dtype(call)).eps / 2


def _accumulation_dtype(call: Call) -> torch.dtype:
    """float32, unless all is float64."""
    return torch.float64 if {a.dtype for a in _floats(call.args)} == {torch.float64} else torch.float32


def _sizes(call: Call) -> dict[int, Tensor]:
    """What to multiply the errors of some results with, by their number, so that all rows count alike."""
    if call.op not in COSINES:
        return {}
    # The gradient of a row is small where the row is large.
    return {1 + i: _norms(x) for i, x in enumerate(call.args[:2])}


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.double(), dim=-1, keepdim=True).clamp(min=NORM_EPS)


def _moved_rows(call: Call) -> tuple[int, ...]:
    """The numbers of the results whose rows are only moved."""
    if call.op is ops.gather_tokens:
        x, sel, bias = call.args
        shared = x.shape[0] != sel.mask.shape[0]  # then its gradient is a sum
        return (*((0,) if bias is None else ()), *(() if shared else (1,)))
    return (0, 1) if call.op is ops.scatter_tokens else ()


def _terms(call: Call, exact: list[Tensor]) -> dict[int, float]:
    """Where terms cancel exactly, so that no estimate shows their size: the size, by the number of the result."""
    if call.op in COSINES:
        # The gradient of a row of one channel, times its norm. Where a cosine rounds past 1, p is clamped and passes no
        # gradient on, which is as large as the sine.
        unit = 2 * _half_ulp(call)
        p = exact[0]
        clamped = bool(((p < ULPS * unit) | ((1 - p < ULPS * unit) & (p != 1))).any())
        size = (2 * ULPS * unit) ** 0.5 * LARGEST_COTANGENT / (ULPS * unit) if clamped else 1.0
        return {1: size, 2: size, 3: size}
    if call.op is ops.boundary_prob_predictability:
        # The derivative of the sigmoid is p (1 - p), with 1 - p as exact as p.
        features, weight, _, out_weight, _, groups = call.args[:6]
        weights = _largest(weight.double()) * _largest(out_weight.double())
        of_p = float(LARGEST_COTANGENT)
        return {1: of_p * weights * _largest(_rstd(features, groups)), **dict.fromkeys((2, 3, 4, 5), of_p)}
    if call.op in (ops.dechunk_ema, ops.dechunk_spatial):
        # The gradient of p is the product of what flows back with h minus its average.
        h = call.args[0].double().nan_to_num()
        return {2: _largest(h) * h.shape[1] * LARGEST_COTANGENT}
    if call.op is ops.group_norm_silu:
        return _terms_of_group_norm(call)
    if call.op is ops.varlen_attention:
        # The scores have no gradient where all keys or all values are equal.
        q, k, v = (x.double().nan_to_num() for x in call.args[:3])
        of_scores = _largest(v) * q.shape[2] ** 0.5
        return {1: _largest(k) * of_scores, 2: _largest(q) * of_scores}
    return {}


def _terms_of_group_norm(call: Call) -> dict[int, float]:
    """Of the result and all gradients: of x, weight, bias and shift.

    The norm undoes the shift of a group of one channel, and the norm of two numbers is the sign of their difference:
    gradients that are exactly zero are sums of terms that are not. And x + shift is rounded before the mean is
    subtracted, in the definition too.
    """
    x, groups, weight, _, shift = (a.double() if _is_float(a) else a for a in call.args)
    x = x.flatten(2).mT if x.dim() == 4 else x
    if x.numel() == 0:
        return {}
    moved = x if shift is None else x + shift[:, None]
    rstd = _rstd(moved.mT, groups)
    sizes = moved.unflatten(2, (groups, -1)).abs().amax((1, 3))
    rounded = 1 + _largest(sizes * rstd)  # x_hat is wrong by so many units
    images, length, _ = x.shape
    of_y = rounded * max(1.0, _largest(weight))
    of_x = of_y * _largest(rstd) * LARGEST_COTANGENT
    of_parameters = of_y * images * length * LARGEST_COTANGENT
    return {0: of_y, 1: of_x, 2: of_parameters, 3: of_parameters, 4: of_x * length}


def _rstd(x: Tensor, groups: int) -> Tensor:
    """(B, groups), 1 / sqrt(var + eps) of the groups of x (B, C, ...)."""
    grouped = x.double().flatten(2).unflatten(1, (groups, -1)).flatten(2)
    return (grouped.var(2, correction=0) + GROUP_NORM_EPS).rsqrt()


def _difference(value: Tensor, truth: Tensor) -> Tensor:
    """Zero where the truth is out of the range of the dtype, and the value is infinite accordingly."""
    return torch.where(value == truth.to(value.dtype), 0.0, value.double() - truth)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _floats(args: Any) -> list[Tensor]:
    return [a for a in args if _is_float(a)]


def _same_kind(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a is b or a == b


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
