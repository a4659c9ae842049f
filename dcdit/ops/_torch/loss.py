"""Ratio loss."""

from torch import Tensor

from dcdit.ops.numerics import upcast


def ratio_loss(p: Tensor, natural_mask: Tensor, target: float, group_size: int | None) -> Tensor:
    groups = 1 if group_size is None else p.shape[0] // group_size
    mean_p = upcast(p).reshape(groups, -1).mean(-1)
    kept_fraction = natural_mask.reshape(groups, -1).to(mean_p.dtype).mean(-1)
    return (target / (target - 1) * ((1 - kept_fraction) * (1 - mean_p) + (target - 1) * kept_fraction * mean_p)).mean()
