"""Ratio loss: partial sums of p and of the mask, then one program over the groups. The order of the sums is fixed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import cdiv

launch.set_default_configs("ratio_loss", {"BLOCK": 8192, "num_warps": 8})


@triton.jit(do_not_specialize=["size", "splits"])
def _sums_kernel(p_ptr, mask_ptr, partial_ptr, size, splits, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of p and count of the mask over one split of one group."""
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    size = size // UNIT * UNIT
    position = split * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    p = tl.load(p_ptr + group * size + position, mask=position < size, other=0.0).to(tl.float32)
    kept = tl.load(mask_ptr + group * size + position, mask=position < size, other=0).to(tl.float32)
    target = partial_ptr + (group * splits + split) * 2
    tl.store(target, tl.sum(p, axis=0))
    tl.store(target + 1, tl.sum(kept, axis=0))


@triton.jit(do_not_specialize=["groups", "size", "splits", "scale", "others"])
def _loss_kernel(
    partial_ptr, loss_ptr, slope_ptr, groups, size, splits, scale, others, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr
):
    """The mean loss of the groups, and for each group the derivative of that mean by one of its p."""
    total = tl.zeros((BLOCK_G,), dtype=tl.float32)
    for first in range(0, groups, BLOCK_G):
        group = first + tl.arange(0, BLOCK_G)  # [BLOCK_G]
        mean_p = tl.zeros((BLOCK_G,), dtype=tl.float32)
        kept = tl.zeros((BLOCK_G,), dtype=tl.float32)
        for start in range(0, splits, BLOCK_S):
            split = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
            mask = (group < groups)[:, None] & (split < splits)[None, :]
            source = partial_ptr + (group.to(tl.int64)[:, None] * splits + split[None, :]) * 2
            mean_p += tl.sum(tl.load(source, mask=mask, other=0.0), axis=1)
            kept += tl.sum(tl.load(source + 1, mask=mask, other=0.0), axis=1)
        mean_p /= size
        kept /= size
        loss = scale * ((1.0 - kept) * (1.0 - mean_p) + others * kept * mean_p)
        total += tl.where(group < groups, loss, 0.0)
        slope = scale * (others * kept - (1.0 - kept)) / size / groups
        tl.store(slope_ptr + group, slope, mask=group < groups)
    tl.store(loss_ptr, tl.sum(total, axis=0) / groups)


def ratio_loss_fwd(p: Tensor, mask: Tensor, target: float, groups: int) -> tuple[Tensor, Tensor]:
    """Contiguous p and bool mask of ``groups`` equal parts -> float32 loss () and slopes (groups,), d loss / d p."""
    size = p.numel() // groups
    config = dict(launch.config_for("ratio_loss", p.device))
    splits = cdiv(size, config["BLOCK"])
    partial = launch.empty((groups, splits, 2), torch.float32, p.device)
    loss, slopes = launch.empty((), torch.float32, p.device), launch.empty((groups,), torch.float32, p.device)
    launch.launch(_sums_kernel, (groups, splits), p, mask, partial, size, splits, UNIT=1 if size % 16 else 16, **config)
    # A kernel gets its numbers in float32, in which target - 1 would lose digits for a target near 1.
    launch.launch(
        _loss_kernel, (1,), partial, loss, slopes, groups, size, splits, target / (target - 1), target - 1,
        BLOCK_G=16, BLOCK_S=32, num_warps=4,
    )  # fmt: skip
    return loss, slopes
