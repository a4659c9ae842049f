"""Moving tokens between the grid and the packed buffer."""

from torch import Tensor

from dcdit.ops import checks
from dcdit.ops.autocast import without_autocast
from dcdit.ops.backend import backend_for
from dcdit.ops.sizes import differ
from dcdit.ops.token_selection import TokenSelection
from dcdit.utils.text import shape_of

__all__ = ["gather_tokens", "scatter_tokens"]


def gather_tokens(x: Tensor, sel: TokenSelection, bias: Tensor | None = None) -> Tensor:
    """Pack the kept tokens, ``(B, L, D) -> (T, D)``, and add ``bias`` on the way.

    Args:
        x: (B, L, D), or (S, D) for a packed source.
        sel: what :func:`dcdit.ops.select_tokens` returned.
        bias: (L, D), e.g. the position embedding; each token gets the row of its position. Grid sources only. A
            parameter: whatever its dtype, the sum is computed in float32 or wider and rounded to x's dtype.

    Returns:
        (T, D) in x's dtype; padding rows are zero. Differentiable in x and bias.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    checks.check_float(x=x, bias=bias)
    _check_source("x", x, sel)
    checks.check_not_empty("x", x, -1, "channel")
    checks.check_device(x=x, indices=sel.indices, bias=bias)
    if bias is not None:
        if sel.source_cu_seqlens is not None:
            raise ValueError("bias needs a grid source (B, L, D); add it to a packed source beforehand")
        checks.check_shape("bias", bias, tuple(x.shape[1:]), "(L, D)")
    with without_autocast(x):
        return backend_for(x).gather_tokens(x, sel, bias)


def scatter_tokens(t: Tensor, sel: TokenSelection, fill: float = 0.0) -> Tensor:
    """Put packed tokens back to their positions, ``(T, D) -> (B, L, D)``; the other positions get ``fill``.

    Args:
        t: (T, D) packed tokens; padding rows are ignored.
        sel: the selection that packed them.
        fill: value of the positions that were not kept.

    Returns:
        (B, L, D), or (S, D) for a packed source, in t's dtype. Differentiable in t.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    checks.check_float(t=t)
    check_packed("t", t, sel)
    with without_autocast(t):
        return backend_for(t).scatter_tokens(t, sel, float(fill))


def check_packed(name: str, t: Tensor, sel: TokenSelection) -> None:
    """t must be (T, D) with the T of the selection, on its device."""
    if t.dim() != 2 or differ(t.shape[0], sel.indices.shape[0]):
        raise ValueError(
            f"{name} has shape {shape_of(t)}; accepted: (T, D) with T = {sel.indices.shape[0]} selected tokens"
        )
    checks.check_not_empty(name, t, -1, "channel")
    checks.check_device(**{name: t, "sel.indices": sel.indices})


def _check_source(name: str, x: Tensor, sel: TokenSelection) -> None:
    if tuple(x.shape[:-1]) != tuple(sel.mask.shape) or x.dim() != sel.mask.dim() + 1:
        raise ValueError(f"{name} has shape {shape_of(x)}; expected {shape_of(sel.mask)} of the selection plus (D,)")
