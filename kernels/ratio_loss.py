"""Ratio loss of groups of images.

    loss = mean over the groups of N / (N - 1) * ((1 - F) (1 - G) + (N - 1) F G)

with N the target compression, F the mean of the natural mask and G the mean of p in the group. Pass 1 sums p and the
mask over splits of each group. Pass 2 is one program: it adds the partial sums up and writes the loss and its
derivative. All sums have a fixed order. The derivative by p is the same number for all positions of a group, so the
backward needs no kernel.

In the comments at pointers, "float" is float32, bfloat16 or float16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import cdiv

launch.set_default_configs("ratio_loss", {"BLOCK": 8192, "num_warps": 8})


@triton.jit(do_not_specialize=["size", "splits"])
def _ratio_loss_sums_kernel(
    p_ptr,  # (groups, size) float
    mask_ptr,  # (groups, size) bool
    partial_ptr,  # (groups, splits, 2) float32
    size, splits, DIVISOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of p and of the mask over one split of one group."""
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    # A size that the compiler knows to be a multiple of DIVISOR allows vector loads under the mask.
    size = size // DIVISOR * DIVISOR
    position = split * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    p = tl.load(p_ptr + group * size + position, mask=position < size, other=0.0).to(tl.float32)
    mask = tl.load(mask_ptr + group * size + position, mask=position < size, other=0).to(tl.float32)
    target = partial_ptr + (group * splits + split) * 2
    tl.store(target, tl.sum(p, axis=0))
    tl.store(target + 1, tl.sum(mask, axis=0))


@triton.jit(do_not_specialize=["groups", "size", "splits", "scale", "target_minus_one"])
def _ratio_loss_fwd_kernel(
    partial_ptr,  # (groups, splits, 2) float32: sums of p and of the mask
    loss_ptr,  # () float32
    grad_p_ptr,  # (groups,) float32: derivative of the loss by one p of the group
    groups, size, splits, scale, target_minus_one, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((BLOCK_G,), dtype=tl.float32)
    for first in range(0, groups, BLOCK_G):
        group = first + tl.arange(0, BLOCK_G)  # [BLOCK_G]
        mean_p = tl.zeros((BLOCK_G,), dtype=tl.float32)
        mean_mask = tl.zeros((BLOCK_G,), dtype=tl.float32)
        for start in range(0, splits, BLOCK_S):
            split = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
            inside = (group < groups)[:, None] & (split < splits)[None, :]  # [BLOCK_G, BLOCK_S]
            source = partial_ptr + (group.to(tl.int64)[:, None] * splits + split[None, :]) * 2
            mean_p += tl.sum(tl.load(source, mask=inside, other=0.0), axis=1)
            mean_mask += tl.sum(tl.load(source + 1, mask=inside, other=0.0), axis=1)
        mean_p /= size
        mean_mask /= size
        loss = scale * ((1.0 - mean_mask) * (1.0 - mean_p) + target_minus_one * mean_mask * mean_p)
        total += tl.where(group < groups, loss, 0.0)
        grad_p = scale * (target_minus_one * mean_mask - (1.0 - mean_mask)) / size / groups
        tl.store(grad_p_ptr + group, grad_p, mask=group < groups)
    tl.store(loss_ptr, tl.sum(total, axis=0) / groups)


def ratio_loss_fwd(p: Tensor, mask: Tensor, target: float, groups: int) -> tuple[Tensor, Tensor]:
    """Contiguous p and bool mask of ``groups`` equal parts -> float32 loss () and d loss / d p of each group (groups,).

    target is N, the compression that the loss asks for.
    """
    size = p.numel() // groups
    config = launch.config_for("ratio_loss", p.device)
    splits = cdiv(size, config["BLOCK"])
    partial = launch.empty((groups, splits, 2), torch.float32, p.device)
    loss, grad_p = launch.empty((), torch.float32, p.device), launch.empty((groups,), torch.float32, p.device)
    launch.launch(
        _ratio_loss_sums_kernel, (groups, splits), p, mask, partial, size, splits,
        DIVISOR=1 if size % 16 else 16, **config,
    )  # fmt: skip
    # A kernel gets its numbers in float32, in which target - 1 would lose digits for a target near 1.
    launch.launch(
        _ratio_loss_fwd_kernel, (1,), partial, loss, grad_p, groups, size, splits, target / (target - 1), target - 1,
        BLOCK_G=16, BLOCK_S=32, num_warps=4,
    )  # fmt: skip
    return loss, grad_p
