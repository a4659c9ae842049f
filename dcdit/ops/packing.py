"""Moving tokens between the grid and the packed buffer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops import checks
from dcdit.ops.autocast import without_autocast
from dcdit.ops.backend import backend_for
from dcdit.ops.sizes import differ
from dcdit.ops.token_selection import TokenSelection
from dcdit.utils.text import shape_of

__all__ = ["gather_tokens", "scatter_tokens"]


LARGEST_FILL = 2**53
"""Integers up to this size go through a float without a change."""


def gather_tokens(x: Tensor, sel: TokenSelection, bias: Tensor | None = None) -> Tensor:
    """Pack the kept tokens, ``(B, L, D) -> (T, D)``, and add ``bias`` on the way.

    A token is whatever follows its position: a row of D channels, (heads, d_h) of a RoPE table, its coordinates, or one
    number. Data are moved bit for bit.

    Args:
        x: (B, L, ...), (1, L, ...) for a table that all images share, or (S, ...) for a packed source. Floats, integers
            or bool.
        sel: what :func:`dcdit.ops.select_tokens` returned.
        bias: (L, ...) with the shape of a token, e.g. the position embedding; each token gets the row of its position.
            If its last dimension is narrower, it is added to the first channels. Grid sources and floats only. A
            parameter: whatever its dtype, the sum is computed in float32 or wider and rounded to x's dtype.

    Returns:
        (T, ...) in x's dtype; padding rows are zero. Differentiable in x and bias.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Example:
        >>> sel = ops.select_from_mask(torch.tensor([[True, False, True], [False, True, False]]))
        >>> x = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]]])
        >>> ops.gather_tokens(x, sel).tolist()
        [[1.0], [3.0], [5.0]]
        >>> position = torch.tensor([[0.1], [0.2], [0.3]])
        >>> ops.gather_tokens(x, sel, bias=position).squeeze(1)
        tensor([1.1000, 3.3000, 5.2000])
    """
    if bias is None:
        checks.check_real(x=x)
    else:
        checks.check_float(x=x, bias=bias)
    token = _check_source(x, sel)
    checks.check_device(x=x, indices=sel.indices, bias=bias)
    if bias is not None:
        bias = _check_bias(bias, x, sel)
    if len(token) != 1:
        x = x.reshape(*x.shape[: sel.mask.dim()], math.prod(token))
    with without_autocast(x):
        out = backend_for(x).gather_tokens(x, sel, bias)
    return out if len(token) == 1 else out.unflatten(1, token) if token else out.squeeze(1)


def scatter_tokens(t: Tensor, sel: TokenSelection, fill: float = 0.0) -> Tensor:
    """Put packed tokens back to their positions, ``(T, D) -> (B, L, D)``; the other positions get ``fill``.

    Args:
        t: (T, ...) packed tokens; padding rows are ignored. Floats, integers or bool.
        sel: the selection that packed them.
        fill: value of the positions that were not kept; for integers a whole number up to 2^53.

    Returns:
        (B, L, ...), or (S, ...) for a packed source, in t's dtype. Differentiable in t.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Example:
        >>> sel = ops.select_from_mask(torch.tensor([[True, False, True]]))
        >>> ops.scatter_tokens(torch.tensor([7, 9]), sel, fill=-1).tolist()
        [[7, -1, 9]]
    """
    checks.check_real(t=t)
    token = t.shape[1:]
    if t.dim() == 0 or differ(t.shape[0], sel.indices.shape[0]):
        raise ValueError(
            f"t has shape {shape_of(t)}; accepted: (T, D) or (T, ...) with T = {sel.indices.shape[0]} selected tokens"
        )
    _check_token("t", t, token)
    checks.check_device(**{"t": t, "sel.indices": sel.indices})
    fill = fill if type(fill) is float and t.is_floating_point() else _check_fill(fill, t)
    if len(token) != 1:
        t = t.reshape(t.shape[0], math.prod(token))
    with without_autocast(t):
        out = backend_for(t).scatter_tokens(t, sel, fill)
    return out if len(token) == 1 else out.unflatten(-1, token) if token else out.squeeze(-1)


def check_packed(name: str, t: Tensor, sel: TokenSelection) -> None:
    """t must be (T, D) with the T of the selection, on its device."""
    if t.dim() != 2 or differ(t.shape[0], sel.indices.shape[0]):
        raise ValueError(
            f"{name} has shape {shape_of(t)}; accepted: (T, D) with T = {sel.indices.shape[0]} selected tokens"
        )
    checks.check_not_empty(name, t, -1, "channel")
    checks.check_device(**{name: t, "sel.indices": sel.indices})


def _check_source(x: Tensor, sel: TokenSelection) -> tuple[int, ...]:
    """The shape of a token."""
    source, shape = sel.mask.shape, x.shape
    positions, token = shape[: len(source)], shape[len(source) :]
    if positions != source and (sel.source_cu_seqlens is not None or positions != (1, source[1])):
        shared = "" if sel.source_cu_seqlens is not None else f", or (1, {source[1]}) where images share it,"
        raise ValueError(f"x has shape {shape_of(x)}; expected {shape_of(sel.mask)} of the selection{shared} plus (D,)")
    _check_token("x", x, token)
    return token


def _check_token(name: str, x: Tensor, token: tuple[int, ...]) -> None:
    if 0 in token:
        raise ValueError(f"{name} has shape {shape_of(x)}; accepted: at least one channel")


def _check_bias(bias: Tensor, x: Tensor, sel: TokenSelection) -> Tensor:
    """The bias as wide as the tokens, (L, D)."""
    if sel.source_cu_seqlens is not None:
        raise ValueError("bias needs a grid source (B, L, D); add it to a packed source beforehand")
    if bias.dim() == 2 and bias.shape == x.shape[1:]:
        return bias
    expected = tuple(x.shape[1:])
    narrow = bias.dim() == x.dim() - 1 > 1 and 0 < bias.shape[-1] < expected[-1]
    if narrow:
        expected = (*expected[:-1], bias.shape[-1])
    checks.check_shape("bias", bias, expected, "(L, D) or narrower")
    if narrow:
        bias = F.pad(bias, (0, x.shape[-1] - bias.shape[-1]))
    return bias.reshape(bias.shape[0], math.prod(bias.shape[1:]))


def _check_fill(fill: float, t: Tensor) -> float:
    if not isinstance(fill, int | float):
        raise TypeError(f"fill is {fill!r}; accepted: a number")
    if t.is_floating_point():
        return float(fill)
    low, high = (0, 1) if t.dtype == torch.bool else (torch.iinfo(t.dtype).min, torch.iinfo(t.dtype).max)
    low, high = max(low, -LARGEST_FILL), min(high, LARGEST_FILL)
    if not (low <= fill <= high and int(fill) == fill):
        raise ValueError(f"fill is {fill}; accepted for {t.dtype}: a whole number from {low} to {high}")
    return int(fill)
