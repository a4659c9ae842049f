"""Boundary probabilities: how hard each position is to predict from its neighbours."""

from torch import Tensor

from dcdit.ops import checks
from dcdit.ops.autocast import without_autocast
from dcdit.ops.backend import backend_for
from dcdit.utils.text import shape_of

__all__ = ["boundary_prob_cosine", "boundary_prob_cosine2d", "boundary_prob_predictability"]


def boundary_prob_cosine(q: Tensor, k: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Cosine dissimilarity of neighbours in a sequence (H-Net, arXiv 2507.07955, section 2.2, equation 4).

    ``p_t = (1 - cos(q_{t-1}, k_t)) / 2``, clamped to [0, 1]; the first position of every sequence has p = 1.

    Args:
        q, k: (B, L, D), or packed (S, D) with ``cu_seqlens``. Any finite rows; a norm below 1e-12 counts as 1e-12.
        cu_seqlens: int32 or int64 (B+1,).

    Returns:
        (B, L) or (S,), float32 (float64 if q or k is). Differentiable in q and k.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]])  # 0, 90 and 180 degrees
        >>> ops.boundary_prob_cosine(x, x).tolist()
        [[1.0, 0.0, 0.5, 1.0]]
    """
    checks.check_float(q=q, k=k)
    checks.check_device(q=q, k=k)
    if q.dim() != (3 if cu_seqlens is None else 2):
        raise ValueError(f"q has shape {shape_of(q)}; accepted: (B, L, D), or (S, D) with cu_seqlens")
    checks.check_not_empty("q", q, -1, "channel")
    checks.check_shape("k", k, tuple(q.shape), "the shape of q")
    if cu_seqlens is not None:
        checks.check_device(q=q, cu_seqlens=cu_seqlens)
        checks.check_cu_seqlens(cu_seqlens, q.shape[0])
    with without_autocast(q):
        return backend_for(q).boundary_prob_cosine(q, k, cu_seqlens)


def boundary_prob_cosine2d(q: Tensor, k: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosine dissimilarity to the filtered neighbourhood on a grid (DC-DiT, arXiv 2603.06351, router v1).

    q and k are divided by their l2 norm over D. kbar is the depthwise 3x3 convolution of k with zero padding. Then
    ``p = (1 - q.kbar) / 2``, clamped to [0, 1].

    Args:
        q, k: (B, L, D). Any finite rows; a norm below 1e-12 counts as 1e-12.
        weight: (D, 3, 3), rows by columns. The mean filter, at the start of training, is 1/9 everywhere.
        grid: (H, W) with H * W = L.

    Returns:
        (B, L), float32 (float64 if an argument is). Differentiable in q, k and weight.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or the grid do not fit.

    Example:
        >>> x, mean = torch.ones(1, 9, 2), torch.full((2, 3, 3), 1 / 9)  # nine equal positions
        >>> ops.boundary_prob_cosine2d(x, x, mean, (3, 3)).view(3, 3)
        tensor([[0.2778, 0.1667, 0.2778],
                [0.1667, 0.0000, 0.1667],
                [0.2778, 0.1667, 0.2778]])
    """
    checks.check_float(q=q, k=k, weight=weight)
    if q.dim() != 3:
        raise ValueError(f"q has shape {shape_of(q)}; accepted: (B, L, D)")
    checks.check_not_empty("q", q, -1, "channel")
    checks.check_shape("k", k, tuple(q.shape), "the shape of q")
    checks.check_shape("weight", weight, (q.shape[2], 3, 3), "(D, 3, 3)")
    checks.check_device(q=q, k=k, weight=weight)
    checks.check_grid(grid, q.shape[1])
    with without_autocast(q):
        return backend_for(q).boundary_prob_cosine2d(q, k, weight, tuple(grid))


def boundary_prob_predictability(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_groups: int = 8,
    eps: float = 1e-5,
) -> Tensor:
    """Tail of the predictability router (DC-DiT, arXiv 2603.06351, router v2, the default).

    ``p = sigmoid(out_weight . SiLU(GroupNorm(features)) + out_bias)``. The first and the last position in raster order
    have p = 1 and pass no gradient.

    Args:
        features: (B, C, H, W), contiguous or channels-last. Their variance must be finite in float32: entries up to
            about 1e18.
        norm_weight, norm_bias: (C,), the affine of the group norm.
        out_weight: (C,) or the (1, C, 1, 1) weight of a 1x1 convolution.
        out_bias: () or (1,).
        num_groups: groups of the norm; divides C.
        eps: added to the variance.

    Returns:
        (B, H*W), float32 (float64 if an argument is). Differentiable in every tensor.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Example:
        >>> features, one, zero = torch.zeros(1, 8, 2, 3), torch.ones(8), torch.zeros(8)  # nothing is hard
        >>> p = ops.boundary_prob_predictability(features, one, zero, one, torch.tensor(0.25).logit())
        >>> [round(number, 4) for number in p[0].tolist()]
        [1.0, 0.25, 0.25, 0.25, 0.25, 1.0]
    """
    checks.check_float(
        features=features, norm_weight=norm_weight, norm_bias=norm_bias, out_weight=out_weight, out_bias=out_bias
    )
    if features.dim() != 4:
        raise ValueError(f"features has shape {shape_of(features)}; accepted: (B, C, H, W)")
    checks.check_not_empty("features", features, 1, "channel")
    channels = features.shape[1]
    checks.check_groups(num_groups, channels)
    checks.check_shape("norm_weight", norm_weight, (channels,), "(C,)")
    checks.check_shape("norm_bias", norm_bias, (channels,), "(C,)")
    if out_weight.numel() != channels:
        raise ValueError(f"out_weight has shape {shape_of(out_weight)}; accepted: (C,) or (1, C, 1, 1)")
    if out_bias.numel() != 1:
        raise ValueError(f"out_bias has shape {shape_of(out_bias)}; accepted: () or (1,)")
    checks.check_device(
        features=features, norm_weight=norm_weight, norm_bias=norm_bias, out_weight=out_weight, out_bias=out_bias
    )
    with without_autocast(features):
        return backend_for(features).boundary_prob_predictability(
            features, norm_weight, norm_bias, out_weight.reshape(channels), out_bias.reshape(()), num_groups, eps
        )
