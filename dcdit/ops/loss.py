"""The ratio loss that steers the router to a target compression."""

from torch import Tensor

from dcdit.ops import checks
from dcdit.ops.autocast import without_autocast
from dcdit.ops.backend import backend_for
from dcdit.utils.text import shape_of

__all__ = ["ratio_loss"]


def ratio_loss(p: Tensor, natural_mask: Tensor, target: float, group_size: int | None = None) -> Tensor:
    """``N/(N-1) * ((1-F)(1-G) + (N-1) F G)`` (H-Net, arXiv 2507.07955, section 2.3, equation 10).

    F is the mean of the mask (no gradient) and G the mean of p over a group of ``group_size`` images. The loss is the
    average over the groups. It is 1 where F = G = 1/N. DC-DiT weights it by 0.03.

    Args:
        p: (B, L) or (S,).
        natural_mask: bool, shape of p: p above the threshold, before any token is dropped.
        target: N > 1, positions per kept token.
        group_size: images per group, a divisor of B; None takes the whole batch.

    Returns:
        () float32 (float64 for float64 p). Differentiable in p.

    Raises:
        ValueError, TypeError: shapes, dtypes, target or group size do not fit.

    Example:
        >>> p = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
        >>> round(ops.ratio_loss(p, p > 0.5, target=4).item(), 6)  # one in four, as wanted
        1.0
        >>> round(ops.ratio_loss(torch.ones(1, 4), torch.ones(1, 4).bool(), target=4).item(), 6)  # all
        4.0
    """
    checks.check_float(p=p)
    checks.check_shape("natural_mask", natural_mask, tuple(p.shape), "the shape of p")
    checks.check_device(p=p, natural_mask=natural_mask)
    if natural_mask.dtype != natural_mask.bool().dtype:
        raise TypeError(f"natural_mask has dtype {natural_mask.dtype}; accepted: bool")
    if p.numel() == 0:
        raise ValueError(f"p has shape {shape_of(p)}; accepted: at least one position")
    if not target > 1:
        raise ValueError(f"target is {target}; accepted: a compression N above 1")
    if group_size is not None and (p.dim() != 2 or group_size < 1 or p.shape[0] % group_size):
        raise ValueError(f"group_size is {group_size}; accepted: a divisor of the batch {p.shape[0]} of p (B, L)")
    with without_autocast(p):
        return backend_for(p).ratio_loss(p, natural_mask, float(target), group_size)
