"""De-chunking: smooth the packed tokens by the router's probability, then spread them over the grid or sequence."""

from torch import Tensor

from dcdit.ops import checks
from dcdit.ops.autocast import without_autocast
from dcdit.ops.backend import backend_for
from dcdit.ops.extra_tokens import around_extra_tokens
from dcdit.ops.packing import check_packed
from dcdit.ops.token_selection import TokenSelection

__all__ = ["dechunk_ema", "dechunk_spatial"]

MAX_SIGMA = 16.0
"""In grid cells. The cost of smoothing grows with sigma."""


def dechunk_spatial(
    h: Tensor,
    p: Tensor,
    sel: TokenSelection,
    grid: tuple[int, int],
    sigma: float = 1.0,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Smooth the kept tokens, then each position takes its nearest one (DC-DiT, arXiv 2603.06351, de-chunking).

    Smoothing is Gaussian over the kept tokens i, j of the same image, at the grid coordinates u. With the clamped
    probability ``q = clamp(p, 1e-4, 1 - 1e-4)``:

    - ``W_ij = exp(-|u_i - u_j|^2 / (2 sigma^2)) q_j``, then each row is divided by (its sum + 1e-8);
    - ``h'_i = q_i h_i + (1 - q_i) sum_j W_ij h_j``.

    Each position takes h' of its nearest kept token (Euclidean, ties to the lowest raster index). An image that keeps
    no token, which only a selection from a mask can have, de-chunks to zeros. The cost is linear in L.

    Extra tokens of the selection come back first and as they are, before the grid: (B, n + L, D).

    Args:
        h: (T, D) packed tokens.
        p: (B, L), the probabilities the selection was made from.
        sel: the selection.
        grid: (H, W) with H * W = L.
        sigma: standard deviation in grid cells, in (0, 16]; 1 at 256 px, 2 at 512 px.
        gate: (B, L) ste_coefficient c of the straight-through gate. It does not change the value, and gets the
            gradient ``<g_l, dechunked_l>``.
        residual: (B, L, D), with extra tokens (B, n + L, D), added to the result.

    Returns:
        The shape of residual, in h's dtype or in the wider one of h and residual. Differentiable in h, p, gate and
        residual.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, grid or sigma do not fit.

    Example:
        >>> p = torch.tensor([[0.9, 0.1, 0.1, 0.1, 0.9]])
        >>> sel = ops.select_tokens(p)  # positions 0 and 4; the middle is as far from both and takes the first
        >>> h = torch.tensor([[1.0], [5.0]])
        >>> ops.dechunk_spatial(h, p, sel, grid=(1, 5)).squeeze().round(decimals=3).tolist()
        [1.0, 1.0, 1.0, 5.0, 5.0]
        >>> ops.dechunk_spatial(h, p, sel, grid=(1, 5), sigma=4.0).squeeze()
        tensor([1.1510, 1.1510, 1.1510, 4.8490, 4.8490])
    """
    if sel.source_cu_seqlens is not None:
        raise ValueError("dechunk_spatial needs a selection over a grid batch (B, L), not over packed sequences")
    _check_common(h, p, sel, gate, residual)
    checks.check_grid(grid, p.shape[1])
    if not 0.0 < sigma <= MAX_SIGMA:
        raise ValueError(f"sigma is {sigma}; accepted: a number in (0, {MAX_SIGMA:g}] grid cells")
    backend, sides, sigma = backend_for(h), tuple(grid), float(sigma)
    with without_autocast(h):
        if sel.grid_selection is None:
            return backend.dechunk_spatial(h, p, sel, sides, sigma, gate, residual)
        return around_extra_tokens(
            lambda h, sel, residual: backend.dechunk_spatial(h, p, sel, sides, sigma, gate, residual), h, sel, residual
        )


def dechunk_ema(
    h: Tensor,
    p: Tensor,
    sel: TokenSelection,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Exponential moving average over the kept tokens, then each position takes the last one so far.

    H-Net (arXiv 2507.07955), section 2.2, equations 5 to 9. Inside each sequence, from 0 and with the clamped
    probability ``q = clamp(p, 1e-4, 1 - 1e-4)``, ``hbar_m = q_m h_m + (1 - q_m) hbar_{m-1}``. Position t takes hbar of
    the last kept token at or before it, 0 where there is none. Extra tokens of the selection come back first and as
    they are; no average reads them.

    Args:
        h: (T, D) packed tokens.
        p: (B, L) or (S,), the probabilities the selection was made from.
        sel: the selection, over a grid batch or packed sequences.
        gate: shape of p, ste_coefficient as in :func:`dechunk_spatial`.
        residual: (B, L, D) or (S, D), with extra tokens (B, n + L, D), added to the result.

    Returns:
        The shape of residual, in h's dtype or in the wider one of h and residual. Differentiable in h, p, gate and
        residual.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Example:
        >>> p = torch.tensor([[1.0, 0.2, 0.75, 0.1]])
        >>> sel = ops.select_tokens(p)  # positions 0 and 2; 4 = 0.75 * 5 + 0.25 * 1
        >>> ops.dechunk_ema(torch.tensor([[1.0], [5.0]]), p, sel).squeeze().round(decimals=3).tolist()
        [1.0, 1.0, 4.0, 4.0]
    """
    _check_common(h, p, sel, gate, residual)
    backend = backend_for(h)
    with without_autocast(h):
        if sel.grid_selection is None:
            return backend.dechunk_ema(h, p, sel, gate, residual)
        return around_extra_tokens(
            lambda h, sel, residual: backend.dechunk_ema(h, p, sel, gate, residual), h, sel, residual
        )


def _check_common(h: Tensor, p: Tensor, sel: TokenSelection, gate: Tensor | None, residual: Tensor | None) -> None:
    checks.check_float(h=h, p=p, gate=gate, residual=residual)
    check_packed("h", h, sel)
    checks.check_shape("p", p, tuple(sel.natural_mask.shape), "the p that the selection was made from")
    if gate is not None:
        checks.check_shape("gate", gate, tuple(p.shape), "the shape of p")
    if residual is not None:
        checks.check_shape("residual", residual, (*sel.mask.shape, h.shape[1]), "the selection's source plus (D,)")
    checks.check_device(h=h, p=p, gate=gate, residual=residual)
