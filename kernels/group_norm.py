"""Group norm and SiLU of channels-last images, with a shift that is added to the input first.

    x_hat = (x + shift - mean) / sqrt(var + eps),  mean and var over the positions and channels of a group of one image
    y = silu(weight x_hat + bias)

Forward reads x twice. Pass 1 writes the mean and the squared deviations of each channel, over splits of each image. A
small kernel merges them to those of a group (Chan's formula) and writes, for each channel, what is subtracted from x
and 1 / standard deviation: later kernels know neither groups nor the shift. Pass 2 writes y.

Backward reads x and the gradient of y twice. Pass 1 writes sums of each channel over the splits, a small kernel adds
them up and derives two means of each group, and pass 2 writes the gradient of x, with grad_hat the gradient by x_hat:

    grad_x = (grad_hat - mean(grad_hat) - x_hat mean(grad_hat x_hat)) / sqrt(var + eps)

The gradient of the shift is the sum of grad_x over the positions: pass 2 writes sums of its tiles, and a last kernel
adds them up. From the sums of pass 1 it would come out as a small difference of large numbers.

How an image is split depends on its own size alone, so its result does not depend on the batch.

In the comments at pointers, "float" is float32, bfloat16 or float16. x has the strides image_stride, row_stride and 1.
The shift has the row stride shift_stride. All others are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.activation import silu, silu_derivative
from dcdit.kernels.numerics import cdiv, next_power_of_2

MAX_SPLITS = 64
"""Most splits of one image: enough to fill a GPU with few images, few enough to combine quickly."""

MIN_POSITIONS = 128
"""Fewest positions in a split, which writes two or three float32 numbers for each channel."""

LEAST_BLOCK_C = 32
"""A warp should read this many channels side by side."""


@triton.jit
def _load_pivot(x_ptr, channel, mask, WIDTH: tl.constexpr):
    """The first number of each channel's group in an image. Means are told less this number, which keeps their digits
    where x is far from zero."""
    return tl.load(x_ptr + channel // WIDTH * WIDTH, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_shift(shift_ptr, image, channel, mask, shift_stride):
    if shift_ptr is None:
        shift = tl.zeros(channel.shape, dtype=tl.float32)
    else:
        shift = tl.load(shift_ptr + image * shift_stride + channel, mask=mask, other=0.0).to(tl.float32)
    return shift


launch.set_default_configs("group_norm_statistics", C={256: {"TILE": 1024, "BLOCK_C": 128, "num_warps": 1}})


@triton.jit(do_not_specialize=["length", "splits", "tiles"])
def _group_norm_statistics_kernel(
    x_ptr,  # (images, length, C) float
    shift_ptr,  # (images, C) float; None without a shift
    partial_ptr,  # (images, splits, 2, C) float32
    length, splits, tiles, image_stride, row_stride, shift_stride, C: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean of x + shift, less the pivot, and sum of squared deviations of each channel over one split of one image.

    The mean of the first tile is subtracted before squares are summed. It is at most sqrt(tiles) standard deviations of
    the split away from its mean, so the sum keeps its digits.
    """
    image, split = (tl.program_id(0) // splits).to(tl.int64), (tl.program_id(0) % splits).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    start = split * tiles * BLOCK_P
    position = start + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    x_ptr += image * image_stride
    mask = (position < length)[:, None] & (channel < C)[None, :]  # [BLOCK_P, BLOCK_C]
    x = tl.load(x_ptr + position[:, None] * row_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    centre = tl.sum(x, axis=0) / tl.minimum(length - start, BLOCK_P).to(tl.float32)  # [BLOCK_C]
    deviations = tl.where(mask, x - centre[None, :], 0.0)  # [BLOCK_P, BLOCK_C]
    squares = deviations * deviations
    for _ in range(1, tiles):
        position += BLOCK_P
        mask = (position < length)[:, None] & (channel < C)[None, :]
        x = tl.load(x_ptr + position[:, None] * row_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        deviation = tl.where(mask, x - centre[None, :], 0.0)
        deviations += deviation
        squares += deviation * deviation
    count = tl.minimum(length - start, tiles * BLOCK_P).to(tl.float32)
    excess = tl.sum(deviations, axis=0) / count  # [BLOCK_C]
    square = tl.maximum(tl.sum(squares, axis=0) - count * excess * excess, 0.0)
    pivot = _load_pivot(x_ptr, channel, channel < C, C // GROUPS)
    shift = _load_shift(shift_ptr, image, channel, channel < C, shift_stride)
    target = partial_ptr + (image * splits + split) * 2 * C + channel
    tl.store(target, (centre - pivot) + excess + shift, mask=channel < C)
    tl.store(target + C, square, mask=channel < C)


@triton.jit(do_not_specialize=["length", "splits", "split_length"])
def _group_norm_combine_kernel(
    x_ptr,  # (images, length, C) float
    shift_ptr,  # (images, C) float; None without a shift
    partial_ptr,  # (images, splits, 2, C) float32
    stats_ptr,  # (images, 2, C) float32: what to subtract from x, and 1 / standard deviation
    length, splits, split_length, image_stride, shift_stride, eps, C: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per group of an image."""
    WIDTH: tl.constexpr = C // GROUPS
    image, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    partial_ptr += image * splits * 2 * C + group * WIDTH
    index = tl.arange(0, BLOCK)  # [BLOCK]
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, splits * WIDTH, BLOCK):
        split = (start + index) // WIDTH  # [BLOCK]
        count = tl.minimum(length - split * split_length, split_length).to(tl.float32)
        part = partial_ptr + split.to(tl.int64) * 2 * C + (start + index) % WIDTH
        total += tl.load(part, mask=split < splits, other=0.0) * count
    entries = length.to(tl.float32) * WIDTH
    mean = tl.sum(total, axis=0) / entries
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, splits * WIDTH, BLOCK):
        split = (start + index) // WIDTH  # [BLOCK]
        count = tl.minimum(length - split * split_length, split_length).to(tl.float32)
        part = partial_ptr + split.to(tl.int64) * 2 * C + (start + index) % WIDTH
        deviation = tl.where(split < splits, tl.load(part, mask=split < splits, other=0.0) - mean, 0.0)
        total += count * deviation
        squares += count * deviation * deviation + tl.load(part + C, mask=split < splits, other=0.0)
    mean += tl.sum(total, axis=0) / entries  # what rounding took from the sum
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / entries + eps)
    for start in range(0, WIDTH, BLOCK):
        mask = start + index < WIDTH  # [BLOCK]
        channel = group * WIDTH + start + index
        pivot = _load_pivot(x_ptr + image * image_stride, channel, mask, WIDTH)
        shift = _load_shift(shift_ptr, image, channel, mask, shift_stride)
        target = stats_ptr + image * 2 * C + channel
        tl.store(target, pivot + (mean - shift), mask=mask)
        tl.store(target + C, tl.zeros((BLOCK,), dtype=tl.float32) + rstd, mask=mask)


@triton.jit
def _load_normed(
    x_ptr, weight_ptr, bias_ptr, stats_ptr, image, position, channel, mask, image_stride, row_stride, C: tl.constexpr
):
    """x_hat and weight x_hat + bias, [BLOCK_P, BLOCK_C] each; weight and reciprocal standard deviation, [BLOCK_C]."""
    channel_mask = channel < C
    centre = tl.load(stats_ptr + image * 2 * C + channel, mask=channel_mask, other=0.0)
    rstd = tl.load(stats_ptr + image * 2 * C + C + channel, mask=channel_mask, other=0.0)
    weight = tl.load(weight_ptr + channel, mask=channel_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=channel_mask, other=0.0).to(tl.float32)
    pointer = x_ptr + image * image_stride + position[:, None] * row_stride + channel[None, :]
    x = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    x_hat = (x - centre[None, :]) * rstd[None, :]
    return x_hat, x_hat * weight[None, :] + bias[None, :], weight, rstd


@triton.jit
def _image_and_positions(length, BLOCK_P: tl.constexpr):
    """Image of this program, and its positions [BLOCK_P]. Both are in the first grid axis, because the other axes are
    limited to 65,535 programs."""
    blocks = tl.cdiv(length, BLOCK_P)
    block = (tl.program_id(0) % blocks).to(tl.int64)
    return (tl.program_id(0) // blocks).to(tl.int64), block * BLOCK_P + tl.arange(0, BLOCK_P)


launch.set_default_configs("group_norm_fwd", C={256: {"TILE": 2048, "BLOCK_C": 128, "num_warps": 2}})


@triton.jit(do_not_specialize=["length"])
def _group_norm_fwd_kernel(
    x_ptr,  # (images, length, C) float
    weight_ptr,  # (C,) float
    bias_ptr,  # (C,) float
    stats_ptr,  # (images, 2, C) float32
    y_ptr,  # (images, length, C) in x's dtype
    length, image_stride, row_stride, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, position = _image_and_positions(length, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    mask = (position < length)[:, None] & (channel < C)[None, :]  # [BLOCK_P, BLOCK_C]
    _, normed, _, _ = _load_normed(
        x_ptr, weight_ptr, bias_ptr, stats_ptr, image, position, channel, mask, image_stride, row_stride, C
    )
    pointer = y_ptr + (image * length + position)[:, None] * C + channel[None, :]
    tl.store(pointer, silu(normed).to(y_ptr.dtype.element_ty), mask=mask)


launch.set_default_configs("group_norm_bwd", C={256: {"TILE": 2048, "BLOCK_C": 64, "num_warps": 2}})


@triton.jit
def _load_grad_normed(grad_ptr, normed, image, position, channel, mask, length, C: tl.constexpr):
    """Gradient by weight x_hat + bias, [BLOCK_P, BLOCK_C]."""
    pointer = grad_ptr + (image * length + position)[:, None] * C + channel[None, :]
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32) * silu_derivative(normed)


@triton.jit(do_not_specialize=["length", "splits", "tiles"])
def _group_norm_sums_kernel(
    grad_ptr,  # (images, length, C) float: gradient of y
    x_ptr,  # (images, length, C) float
    weight_ptr,  # (C,) float
    bias_ptr,  # (C,) float
    stats_ptr,  # (images, 2, C) float32
    partial_ptr,  # (images, splits, 2, C) float32
    length, splits, tiles, image_stride, row_stride, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias over one split of one image."""
    image, split = (tl.program_id(0) // splits).to(tl.int64), (tl.program_id(0) % splits).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    position = split * tiles * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    weight_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    bias_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for _ in range(tiles):
        mask = (position < length)[:, None] & (channel < C)[None, :]  # [BLOCK_P, BLOCK_C]
        x_hat, normed, _, _ = _load_normed(
            x_ptr, weight_ptr, bias_ptr, stats_ptr, image, position, channel, mask, image_stride, row_stride, C
        )
        grad_normed = _load_grad_normed(grad_ptr, normed, image, position, channel, mask, length, C)
        weight_sum += grad_normed * x_hat
        bias_sum += grad_normed
        position += BLOCK_P
    target = partial_ptr + (image * splits + split) * 2 * C + channel
    tl.store(target, tl.sum(weight_sum, axis=0), mask=channel < C)
    tl.store(target + C, tl.sum(bias_sum, axis=0), mask=channel < C)


@triton.jit
def _sum_parts(part_ptr, channel, mask, parts, STRIDE: tl.constexpr, BLOCK_S: tl.constexpr):
    """Sums of rows that are STRIDE numbers apart, [BLOCK_C]."""
    total = tl.zeros(channel.shape, dtype=tl.float32)
    for start in range(0, parts, BLOCK_S):
        part = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        pointer = part_ptr + part.to(tl.int64)[:, None] * STRIDE + channel[None, :]
        total += tl.sum(tl.load(pointer, mask=(part < parts)[:, None] & mask[None, :], other=0.0), axis=0)
    return total


@triton.jit(do_not_specialize=["length", "splits"])
def _group_norm_combine_bwd_kernel(
    partial_ptr,  # (images, splits, 2, C) float32
    weight_ptr,  # (C,) float
    sums_ptr,  # (images, 2, C) float32: gradients of weight and bias, of each image
    means_ptr,  # (images, 2, GROUPS) float32: mean(grad_hat) and mean(grad_hat x_hat)
    length, splits, C: tl.constexpr, GROUPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per group of an image."""
    WIDTH: tl.constexpr = C // GROUPS
    image, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    partial_ptr += image * splits * 2 * C
    mean_grad, mean_grad_x_hat = 0.0, 0.0
    for start in range(0, WIDTH, BLOCK_C):
        col = start + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        channel, mask = group * WIDTH + col, col < WIDTH
        weight_sum = _sum_parts(partial_ptr, channel, mask, splits, 2 * C, BLOCK_S)
        bias_sum = _sum_parts(partial_ptr + C, channel, mask, splits, 2 * C, BLOCK_S)
        tl.store(sums_ptr + image * 2 * C + channel, weight_sum, mask=mask)
        tl.store(sums_ptr + image * 2 * C + C + channel, bias_sum, mask=mask)
        weight = tl.load(weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
        mean_grad += tl.sum(weight * bias_sum, axis=0)
        mean_grad_x_hat += tl.sum(weight * weight_sum, axis=0)
    entries = length.to(tl.float32) * WIDTH
    tl.store(means_ptr + image * 2 * GROUPS + group, mean_grad / entries)
    tl.store(means_ptr + image * 2 * GROUPS + GROUPS + group, mean_grad_x_hat / entries)


@triton.jit(do_not_specialize=["length"])
def _group_norm_bwd_kernel(
    grad_ptr,  # (images, length, C) float: gradient of y
    x_ptr,  # (images, length, C) float
    weight_ptr,  # (C,) float
    bias_ptr,  # (C,) float
    stats_ptr,  # (images, 2, C) float32
    means_ptr,  # (images, 2, GROUPS) float32
    grad_x_ptr,  # (images, length, C) in x's dtype; None if not wanted
    shift_partial_ptr,  # (images, blocks, C) float32: sums of grad_x over each tile; None if not wanted
    length, image_stride, row_stride, C: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, position = _image_and_positions(length, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    mask = (position < length)[:, None] & (channel < C)[None, :]  # [BLOCK_P, BLOCK_C]
    x_hat, normed, weight, rstd = _load_normed(
        x_ptr, weight_ptr, bias_ptr, stats_ptr, image, position, channel, mask, image_stride, row_stride, C
    )
    mean_ptr = means_ptr + image * 2 * GROUPS + channel // (C // GROUPS)
    mean_grad = tl.load(mean_ptr, mask=channel < C, other=0.0)  # [BLOCK_C]
    mean_grad_x_hat = tl.load(mean_ptr + GROUPS, mask=channel < C, other=0.0)  # [BLOCK_C]
    grad_hat = _load_grad_normed(grad_ptr, normed, image, position, channel, mask, length, C) * weight[None, :]
    grad_x = (grad_hat - mean_grad[None, :] - x_hat * mean_grad_x_hat[None, :]) * rstd[None, :]
    if grad_x_ptr is not None:
        pointer = grad_x_ptr + (image * length + position)[:, None] * C + channel[None, :]
        tl.store(pointer, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if shift_partial_ptr is not None:
        target = shift_partial_ptr + tl.program_id(0).to(tl.int64) * C + channel
        tl.store(target, tl.sum(tl.where(mask, grad_x, 0.0), axis=0), mask=channel < C)


@triton.jit(do_not_specialize=["blocks"])
def _group_norm_shift_kernel(
    shift_partial_ptr,  # (images, blocks, C) float32
    grad_shift_ptr,  # (images, C) float
    blocks, C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    total = _sum_parts(shift_partial_ptr + image * blocks * C, channel, channel < C, blocks, C, BLOCK_S)
    tl.store(grad_shift_ptr + image * C + channel, total.to(grad_shift_ptr.dtype.element_ty), mask=channel < C)


def group_norm_silu_fwd(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(B, L, C) and (B, C) shift with unit last strides, contiguous (C,) weight and bias -> y (B, L, C) and stats.

    stats (B, 2, C) float32 holds what is subtracted from x, and 1 / standard deviation.
    """
    images, length, channels = x.shape
    shift_stride = 0 if shift is None else shift.stride(0)
    stats = launch.empty((images, 2, channels), torch.float32, x.device)
    y = launch.empty(x.shape, x.dtype, x.device)
    if length == 0:
        return y, stats
    config = _tile_config("group_norm_statistics", x)
    tiles, splits = _split(length, config["BLOCK_P"])
    partial = launch.empty((images, splits, 2, channels), torch.float32, x.device)
    launch.launch(
        _group_norm_statistics_kernel, (images * splits, cdiv(channels, config["BLOCK_C"])),
        x, shift, partial, length, splits, tiles, x.stride(0), x.stride(1), shift_stride,
        C=channels, GROUPS=num_groups, **config,
    )  # fmt: skip
    launch.launch(
        _group_norm_combine_kernel, (images * num_groups,),
        x, shift, partial, stats, length, splits, tiles * config["BLOCK_P"], x.stride(0), shift_stride, eps,
        C=channels, GROUPS=num_groups, BLOCK=128, num_warps=1,
    )  # fmt: skip
    config = _tile_config("group_norm_fwd", x)
    launch.launch(
        _group_norm_fwd_kernel, (images * cdiv(length, config["BLOCK_P"]), cdiv(channels, config["BLOCK_C"])),
        x, weight, bias, stats, y, length, x.stride(0), x.stride(1), C=channels, **config,
    )  # fmt: skip
    return y, stats


def group_norm_silu_bwd(
    grad: Tensor, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, stats: Tensor,
    shift_dtype: torch.dtype | None, need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous (B, L, C) gradient of y -> gradients of x, of weight and bias, of the shift.

    The first is (B, L, C) in x's dtype, or (0,) if not needed. The second is (2, C) float32. The third is (B, C) in
    ``shift_dtype``, or (0,) if that is None.
    """
    images, length, channels = x.shape
    config = _tile_config("group_norm_bwd", x)
    block_p, block_c = config["BLOCK_P"], config["BLOCK_C"]
    (tiles, splits), blocks = _split(length, block_p), cdiv(length, block_p)
    partial = launch.empty((images, splits, 2, channels), torch.float32, x.device)
    launch.launch(
        _group_norm_sums_kernel, (images * splits, cdiv(channels, block_c)),
        grad, x, weight, bias, stats, partial, length, splits, tiles, x.stride(0), x.stride(1), C=channels, **config,
    )  # fmt: skip
    sums = launch.empty((images, 2, channels), torch.float32, x.device)
    means = launch.empty((images, 2, num_groups), torch.float32, x.device)
    launch.launch(
        _group_norm_combine_bwd_kernel, (images * num_groups,), partial, weight, sums, means, length, splits,
        C=channels, GROUPS=num_groups, BLOCK_S=16, BLOCK_C=min(64, next_power_of_2(channels // num_groups)),
        num_warps=2,
    )  # fmt: skip
    grad_x = launch.empty(x.shape if need_x else (0,), x.dtype, x.device)
    grad_shift = launch.empty((0,) if shift_dtype is None else (images, channels), shift_dtype or x.dtype, x.device)
    shift_partial = None if shift_dtype is None else launch.empty((images, blocks, channels), torch.float32, x.device)
    if need_x or shift_dtype is not None:
        launch.launch(
            _group_norm_bwd_kernel, (images * blocks, cdiv(channels, block_c)),
            grad, x, weight, bias, stats, means, grad_x if need_x else None, shift_partial,
            length, x.stride(0), x.stride(1), C=channels, GROUPS=num_groups, **config,
        )  # fmt: skip
    if shift_partial is not None:
        launch.launch(
            _group_norm_shift_kernel, (images, cdiv(channels, 128)), shift_partial, grad_shift, blocks,
            C=channels, BLOCK_S=16, BLOCK_C=128, num_warps=4,
        )  # fmt: skip
    return grad_x, sums.sum(0), grad_shift


def _split(length: int, block_p: int) -> tuple[int, int]:
    """Tiles in a split, and splits of an image."""
    tiles = cdiv(max(MIN_POSITIONS, cdiv(length, MAX_SPLITS)), block_p)
    return tiles, cdiv(length, tiles * block_p)


def _tile_config(kernel: str, x: Tensor) -> launch.Config:
    """The configuration with the block of channels, at most its BLOCK_C, that pads C least."""
    config = dict(launch.config_for(kernel, x.device, C=x.shape[2]))
    most, tile = config.pop("BLOCK_C"), config.pop("TILE")
    candidates = [most]
    while candidates[-1] > LEAST_BLOCK_C:
        candidates.append(candidates[-1] // 2)
    block_c = min(candidates, key=lambda block: cdiv(x.shape[2], block) * block)
    return {**config, "BLOCK_C": block_c, "BLOCK_P": max(1, tile // block_c)}
