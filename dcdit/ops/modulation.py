"""adaLN modulation on packed tokens. Each token looks up shift, scale and gate of its image; they are not expanded."""

from torch import Tensor

from dcdit.ops import checks, unchecked
from dcdit.ops.autocast import without_autocast
from dcdit.ops.backend import backend_for
from dcdit.utils.text import shape_of

__all__ = ["gated_add", "gated_add_modulated_layer_norm", "modulated_layer_norm", "modulated_rms_norm"]


def modulated_layer_norm(
    t: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``LayerNorm(t) * (1 + scale[seg]) + shift[seg]`` (adaLN of DiT, arXiv 2212.09748, section 3.2).

    seg is the image of a token. With a weight and a bias, the norm is ``LayerNorm(t) * weight + bias``.

    Args:
        t: (T, D) packed tokens. Their variance must be finite in float32: entries up to about 1e18.
        shift, scale: (B, D) of one dtype, one row per image (column slices of a (B, 6D) tensor are fine).
        cu_seqlens: int32 or int64 (B+1,). Rows past ``cu_seqlens[-1]`` are padding and come back as zeros.
        eps: added to the variance.
        weight, bias: (D,) of the norm itself, one, both or none of them.

    Returns:
        (T, D) in t's dtype. Differentiable in every float argument. Gradients repeat to the bit.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Example:
        >>> t = torch.tensor([[1.0, 3.0], [2.0, 6.0], [7.0, 5.0]])  # one token of the first image, two of the second
        >>> shift, scale = torch.tensor([[0.0, 0.0], [10.0, 10.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> ops.modulated_layer_norm(t, shift, scale, torch.tensor([0, 1, 3])).round(decimals=3).tolist()
        [[-1.0, 1.0], [8.0, 12.0], [12.0, 8.0]]
    """
    _check_tokens(cu_seqlens, t=t)
    _check_modulation(t, cu_seqlens, shift=shift, scale=scale)
    if weight is None and bias is None:
        return unchecked.modulated_layer_norm(t, shift, scale, cu_seqlens, float(eps))
    _check_affine(t, weight=weight, bias=bias)
    with without_autocast(t):
        return backend_for(t).modulated_layer_norm(t, shift, scale, cu_seqlens, float(eps), weight, bias)


def modulated_rms_norm(
    t: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float = 1e-6,
    weight: Tensor | None = None,
) -> Tensor:
    """``t / sqrt(mean(t^2) + eps) * weight * (1 + scale[seg]) + shift[seg]``: adaLN around an RMSNorm.

    seg is the image of a token. RMSNorm is arXiv 1910.07467, equation 4. Models without a shift pass None.

    Args:
        t: (T, D) packed tokens. Their mean square must be finite in float32: entries up to about 1e18.
        shift, scale: (B, D) of one dtype, one row per image (column slices of a wider tensor are fine).
        cu_seqlens: int32 or int64 (B+1,). Rows past ``cu_seqlens[-1]`` are padding and come back as zeros.
        eps: added to the mean square.
        weight: (D,) of the norm itself.

    Returns:
        (T, D) in t's dtype. Differentiable in every float argument. Gradients repeat to the bit.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Example:
        >>> t, scale, weight = torch.randn(5, 8), torch.zeros(2, 8), torch.ones(8)
        >>> normed = ops.modulated_rms_norm(t, None, scale, torch.tensor([0, 2, 5]), weight=weight)
        >>> torch.allclose(normed, torch.nn.functional.rms_norm(t, (8,), weight, 1e-6), atol=1e-6)
        True
    """
    _check_tokens(cu_seqlens, t=t)
    _check_modulation(t, cu_seqlens, **({} if shift is None else {"shift": shift}), scale=scale)
    _check_affine(t, weight=weight)
    with without_autocast(t):
        return backend_for(t).modulated_rms_norm(t, shift, scale, cu_seqlens, float(eps), weight)


def gated_add(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``x + gate[seg] * y``, seg the image of a token (adaLN-Zero of DiT, arXiv 2212.09748, section 3.2).

    Args:
        x, y: (T, D) packed tokens.
        gate: (B, D), one row per image.
        cu_seqlens: int32 or int64 (B+1,). Rows past ``cu_seqlens[-1]`` are padding and come back as they are in x.

    Returns:
        (T, D) in the wider dtype of x and y. Differentiable in x, y and gate.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Example:
        >>> x, y, gate = torch.ones(3, 2), torch.ones(3, 2), torch.tensor([[2.0, 0.0], [5.0, -1.0]])
        >>> ops.gated_add(x, y, gate, torch.tensor([0, 1, 3])).tolist()
        [[3.0, 1.0], [6.0, 0.0], [6.0, 0.0]]
    """
    _check_tokens(cu_seqlens, x=x, y=y)
    _check_modulation(x, cu_seqlens, gate=gate)
    return unchecked.gated_add(x, y, gate, cu_seqlens)


def gated_add_modulated_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """:func:`gated_add` followed by :func:`modulated_layer_norm` of its result, in one pass over the tokens.

    Args:
        x, y: (T, D) packed tokens.
        gate, shift, scale: (B, D) of one dtype, one row per image.
        cu_seqlens: int32 or int64 (B+1,). Padding rows come back as in the two operations.
        eps: added to the variance.

    Returns:
        ``(x + gate[seg] * y, LayerNorm(x + gate[seg] * y) * (1 + scale[seg]) + shift[seg])``, both (T, D) in the wider
        dtype of x and y. The norm reads the sum as it is stored, rounded to that dtype. Differentiable in every float
        argument. The backward reads the sum too: changed in place before it, the sum is an error there.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Example:
        >>> x, y, gate = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 4.0]]), torch.tensor([[0.5, 0.5]])
        >>> shift, scale = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 2.0]])
        >>> added, normed = ops.gated_add_modulated_layer_norm(x, y, gate, shift, scale, torch.tensor([0, 1]))
        >>> added.tolist(), normed.round(decimals=3).tolist()
        ([[1.0, 3.0]], [[-1.0, 4.0]])
    """
    _check_tokens(cu_seqlens, x=x, y=y)
    _check_modulation(x, cu_seqlens, gate=gate, shift=shift, scale=scale)
    return unchecked.gated_add_modulated_layer_norm(x, y, gate, shift, scale, cu_seqlens, float(eps))


def _check_tokens(cu_seqlens: Tensor, **tokens: Tensor) -> None:
    checks.check_float(**tokens)
    (first_name, first), *others = tokens.items()
    if first.dim() != 2:
        raise ValueError(f"{first_name} has shape {shape_of(first)}; accepted: packed tokens (T, D)")
    checks.check_not_empty(first_name, first, -1, "channel")
    for name, tensor in others:
        checks.check_shape(name, tensor, tuple(first.shape), f"the shape of {first_name}")
    checks.check_device(**tokens, cu_seqlens=cu_seqlens)
    checks.check_cu_seqlens(cu_seqlens, first.shape[0], exact=False)


def _check_affine(t: Tensor, **affine: Tensor | None) -> None:
    checks.check_float(**affine)
    for name, tensor in affine.items():
        if tensor is not None:
            checks.check_shape(name, tensor, (t.shape[1],), "(D,)")
            checks.check_device(**{"tokens": t, name: tensor})


def _check_modulation(t: Tensor, cu_seqlens: Tensor, **modulation: Tensor) -> None:
    checks.check_float(**modulation)
    checks.check_same(**modulation)
    for name, tensor in modulation.items():
        checks.check_shape(name, tensor, (cu_seqlens.shape[0] - 1, t.shape[1]), "(B, D)")
        checks.check_device(**{"tokens": t, name: tensor})
