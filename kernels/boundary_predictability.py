"""Tail of the predictability router: group norm, SiLU, dot product over the channels, sigmoid; one number per position.

    x_hat = (x - mean) / sqrt(var + eps),  mean and var over the positions and channels of a group of one image
    y = norm_weight x_hat + norm_bias
    p = sigmoid(sum_c out_weight[c] silu(y[c]) + out_bias),  1 at the first and the last position

Forward reads the features twice. Pass 1 writes partial statistics of splits of each image. Pass 2 combines them and
writes p and the statistics. Backward reads the features twice more. Pass 1 writes the gradients of the parameters as
partial sums over splits. A small kernel adds them up per image and derives two means per group. Pass 2 writes the
gradient of the features, with grad_hat the gradient by x_hat:

    grad_x = (grad_hat - mean(grad_hat) - x_hat mean(grad_hat x_hat)) / sqrt(var + eps)

The memory format is channels-last (the channels of a position are adjacent) or channels-first (the positions of a
channel are). A tile is [positions, channels] either way and only the addresses differ. ``outer_stride`` is the stride
between positions if channels-last, else between channels. How an image is split depends on its own size alone, so its
result does not depend on the batch.

In the comments at pointers, "float" is float32, bfloat16 or float16. A pointer of shape (images, C, length) has the
strides image_stride, outer_stride and 1 in the memory format; all others are contiguous.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.activation import silu, silu_derivative
from dcdit.kernels.numerics import cdiv, next_power_of_2

MAX_SPLITS = 128
"""Most splits of one image: enough for one image to fill a GPU, few enough to combine quickly."""

MIN_POSITIONS = 64
"""Fewest positions in a split of the statistics: merging the elements of a tile costs as much as some tiles."""

MIN_TILES = 4
"""Fewest tiles in a split of the backward, which writes three numbers per channel and split."""

MAX_POSITIONS = 256
"""Most positions in a tile of the statistics, however few channels there are."""

MAX_MEMBERSHIP = 8192
"""Most entries of the groups x channels table by which one statistics program adds channels up to groups."""

launch.set_default_configs("predictability_channels_last", C={256: {"BLOCK_P": 16, "BLOCK_C": 128, "num_warps": 4}})
launch.set_default_configs("predictability_channels_first", C={256: {"BLOCK_P": 64, "BLOCK_C": 32, "num_warps": 4}})


@triton.jit
def _offsets(position, channel, outer_stride, CHANNELS_LAST: tl.constexpr):
    """[BLOCK_P, BLOCK_C] offsets inside an image."""
    if CHANNELS_LAST:
        return position[:, None] * outer_stride + channel[None, :]
    return channel[None, :] * outer_stride + position[:, None]


@triton.jit
def _load_shift(
    x_ptr, image, group, mask, image_stride, outer_stride, WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """One feature of each group. It is subtracted first, so that features far from zero keep their digits."""
    channel = group.to(tl.int64) * WIDTH
    offset = channel if CHANNELS_LAST else channel * outer_stride
    return tl.load(x_ptr + image * image_stride + offset, mask=mask, other=0.0).to(tl.float32)


launch.set_default_configs("predictability_statistics", C={256: {"TILE": 4096, "num_warps": 4}})


@triton.jit(do_not_specialize=["length", "tiles"])
def _predictability_statistics_kernel(
    x_ptr,  # (images, C, length) float
    partial_ptr,  # (images, splits, 2, GROUPS) float32
    length, tiles, image_stride, outer_stride, C: tl.constexpr, GROUPS: tl.constexpr, PROGRAM_GROUPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, DIVISOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Mean, less the shift, and sum of squared deviations of PROGRAM_GROUPS groups over one split of one image."""
    WIDTH: tl.constexpr = C // GROUPS
    image, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    # A length that the compiler knows to be a multiple of DIVISOR allows vector loads under the masks.
    length = length // DIVISOR * DIVISOR
    col = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    channel = tl.program_id(2).to(tl.int64) * PROGRAM_GROUPS * WIDTH + col
    channel_mask = (col < PROGRAM_GROUPS * WIDTH) & (channel < C)
    position = split * tiles * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]

    shift = _load_shift(x_ptr, image, channel // WIDTH, channel_mask, image_stride, outer_stride, WIDTH, CHANNELS_LAST)
    # Every element of the tile sums over the tiles what its later features differ by from its first. Positions and
    # channels are merged once, at the end.
    mask = (position < length)[:, None] & channel_mask[None, :]  # [BLOCK_P, BLOCK_C]
    pointer = x_ptr + image * image_stride + _offsets(position, channel, outer_stride, CHANNELS_LAST)
    first = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_P, BLOCK_C]
    excess = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    count = tl.maximum(tl.minimum((length - position + BLOCK_P - 1) // BLOCK_P, tiles), 0).to(tl.float32)  # [BLOCK_P]
    for _ in range(1, tiles):
        position += BLOCK_P
        pointer += BLOCK_P * outer_stride if CHANNELS_LAST else BLOCK_P
        mask = (position < length)[:, None] & channel_mask[None, :]
        delta = tl.load(pointer, mask=mask, other=0.0).to(tl.float32) - first
        delta = tl.where(mask, delta, 0.0)
        excess += delta
        square += delta * delta
    part = (1.0 / tl.maximum(count, 1.0))[:, None]
    mean = first - shift[None, :] + excess * part  # [BLOCK_P, BLOCK_C]
    square -= excess * excess * part

    total = tl.sum(count, axis=0)
    channel_mean = tl.sum(mean * count[:, None], axis=0) / total  # [BLOCK_C]
    deviation = mean - channel_mean[None, :]  # [BLOCK_P, BLOCK_C]
    channel_square = tl.sum(square + count[:, None] * deviation * deviation, axis=0)  # [BLOCK_C]
    group = tl.arange(0, BLOCK_G)  # [BLOCK_G]
    member = (group[:, None] == (col // WIDTH)[None, :]) & channel_mask[None, :]  # [BLOCK_G, BLOCK_C]
    group_mean = tl.sum(tl.where(member, channel_mean[None, :], 0.0), axis=1) / WIDTH  # [BLOCK_G]
    deviation = channel_mean[None, :] - group_mean[:, None]  # [BLOCK_G, BLOCK_C]
    group_square = tl.sum(tl.where(member, channel_square[None, :] + total * deviation * deviation, 0.0), axis=1)

    group = tl.program_id(2) * PROGRAM_GROUPS + group
    wanted = (tl.arange(0, BLOCK_G) < PROGRAM_GROUPS) & (group < GROUPS)
    target = partial_ptr + (image * tl.num_programs(1) + split) * 2 * GROUPS + group
    tl.store(target, group_mean, mask=wanted)
    tl.store(target + GROUPS, group_square, mask=wanted)


@triton.jit
def _combine_statistics(
    partial_ptr,  # (images, splits, 2, GROUPS) float32
    image, length, splits, split_length, eps, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Mean, less the shift, and reciprocal standard deviation of an image's groups, [BLOCK_G] each."""
    group = tl.arange(0, BLOCK_G)  # [BLOCK_G]
    base = partial_ptr + image * splits * 2 * GROUPS + group[None, :]
    mean = tl.zeros((BLOCK_G,), dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        mask = (split < splits)[:, None] & (group < GROUPS)[None, :]  # [BLOCK_S, BLOCK_G]
        count = tl.maximum(tl.minimum(length - split * split_length, split_length), 0).to(tl.float32)
        part = tl.load(base + (split * 2 * GROUPS)[:, None], mask=mask, other=0.0)
        mean += tl.sum(part * count[:, None], axis=0)
    mean /= length
    square = tl.zeros((BLOCK_G,), dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        mask = (split < splits)[:, None] & (group < GROUPS)[None, :]  # [BLOCK_S, BLOCK_G]
        count = tl.maximum(tl.minimum(length - split * split_length, split_length), 0).to(tl.float32)
        deviation = tl.load(base + (split * 2 * GROUPS)[:, None], mask=mask, other=0.0) - mean[None, :]
        part = tl.load(base + (split * 2 * GROUPS + GROUPS)[:, None], mask=mask, other=0.0)
        square += tl.sum(part + WIDTH * count[:, None] * deviation * deviation, axis=0)
    return mean, 1.0 / tl.sqrt(square / length / WIDTH + eps)


@triton.jit
def _image_and_block(length, BLOCK_P: tl.constexpr):
    """Image of this program, and which block of its positions. Both are in the first grid axis, because the other axes
    are limited to 65,535 programs."""
    blocks = tl.cdiv(length, BLOCK_P)
    return (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)


@triton.jit(do_not_specialize=["length", "splits", "split_length"])
def _predictability_score_kernel(
    x_ptr,  # (images, C, length) float
    norm_weight_ptr,  # (C,) float
    norm_bias_ptr,  # (C,) float
    out_weight_ptr,  # (C,) float
    out_bias_ptr,  # () float
    partial_ptr,  # (images, splits, 2, GROUPS) float32
    p_ptr,  # (images, length) float32
    stats_ptr,  # (images, 2, GROUPS) float32: mean and 1 / standard deviation
    length, splits, split_length, image_stride, outer_stride, eps,
    C: tl.constexpr, GROUPS: tl.constexpr, CHANNELS_LAST: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = C // GROUPS
    length = length // DIVISOR * DIVISOR
    image, block = _image_and_block(length, BLOCK_P)
    group = tl.arange(0, BLOCK_G)  # [BLOCK_G]
    mean, rstd = _combine_statistics(
        partial_ptr, image, length, splits, split_length, eps, WIDTH, GROUPS, BLOCK_S, BLOCK_G
    )
    mean += _load_shift(x_ptr, image, group, group < GROUPS, image_stride, outer_stride, WIDTH, CHANNELS_LAST)
    if block == 0:
        tl.store(stats_ptr + image * 2 * GROUPS + group, mean, mask=group < GROUPS)
        tl.store(stats_ptr + image * 2 * GROUPS + GROUPS + group, rstd, mask=group < GROUPS)

    position = block * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    terms = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in tl.static_range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        channel_mask = channel < C
        mask = (position < length)[:, None] & channel_mask[None, :]  # [BLOCK_P, BLOCK_C]
        pointer = x_ptr + image * image_stride + _offsets(position, channel.to(tl.int64), outer_stride, CHANNELS_LAST)
        x = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_P, BLOCK_C]
        norm_weight = tl.load(norm_weight_ptr + channel, mask=channel_mask, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + channel, mask=channel_mask, other=0.0).to(tl.float32)
        out_weight = tl.load(out_weight_ptr + channel, mask=channel_mask, other=0.0).to(tl.float32)
        group = tl.minimum(channel // WIDTH, GROUPS - 1)  # [BLOCK_C]
        scale = norm_weight * tl.gather(rstd, group, 0)
        y = (x - tl.gather(mean, group, 0)[None, :]) * scale[None, :] + norm_bias[None, :]  # [BLOCK_P, BLOCK_C]
        terms += out_weight[None, :] * silu(y)
    p = tl.sigmoid(tl.sum(terms, axis=1) + tl.load(out_bias_ptr).to(tl.float32))  # [BLOCK_P]
    forced = (position == 0) | (position == length - 1)
    tl.store(p_ptr + image * length + position, tl.where(forced, 1.0, p), mask=position < length)


@triton.jit
def _load_normed(
    x_ptr, norm_weight_ptr, norm_bias_ptr, stats_ptr, image, position, channel, mask, image_stride, outer_stride,
    C: tl.constexpr, GROUPS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """x_hat and y, [BLOCK_P, BLOCK_C] each; norm weight and reciprocal standard deviation, [BLOCK_C] each."""
    group_stats_ptr = stats_ptr + image * 2 * GROUPS + channel // (C // GROUPS)
    channel_mask = channel < C
    mean = tl.load(group_stats_ptr, mask=channel_mask, other=0.0)
    rstd = tl.load(group_stats_ptr + GROUPS, mask=channel_mask, other=0.0)
    norm_weight = tl.load(norm_weight_ptr + channel, mask=channel_mask, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + channel, mask=channel_mask, other=0.0).to(tl.float32)
    pointer = x_ptr + image * image_stride + _offsets(position, channel, outer_stride, CHANNELS_LAST)
    x = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    x_hat = (x - mean[None, :]) * rstd[None, :]
    return x_hat, x_hat * norm_weight[None, :] + norm_bias[None, :], norm_weight, rstd


@triton.jit
def _load_grad_logit(grad_ptr, p_ptr, image, position, length):
    """Gradient before the last sigmoid, [BLOCK_P]. Forced positions have p = 1 exactly, and get zero."""
    offset = image * length + position
    grad = tl.load(grad_ptr + offset, mask=position < length, other=0.0).to(tl.float32)
    p = tl.load(p_ptr + offset, mask=position < length, other=0.0)
    return tl.where(p == 1.0, 0.0, grad * p * (1.0 - p))


@triton.jit(do_not_specialize=["length", "tiles"])
def _predictability_sums_kernel(
    grad_ptr,  # (images, length) float: gradient of p
    x_ptr,  # (images, C, length) float
    norm_weight_ptr,  # (C,) float
    norm_bias_ptr,  # (C,) float
    p_ptr,  # (images, length) float32
    stats_ptr,  # (images, 2, GROUPS) float32
    partial_ptr,  # (images, splits, 3, C) float32: gradients of norm weight and norm bias / out weight, of out weight
    bias_partial_ptr,  # (images, splits) float32: gradient of the out bias
    length, tiles, image_stride, outer_stride, C: tl.constexpr, GROUPS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    DIVISOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters over one split of one image."""
    image, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = length // DIVISOR * DIVISOR
    channel = tl.program_id(2).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    position = split * tiles * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    norm_weight_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    norm_bias_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    out_weight_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    out_bias_sum = tl.zeros((BLOCK_P,), dtype=tl.float32)
    for _ in range(tiles):
        mask = (position < length)[:, None] & (channel < C)[None, :]  # [BLOCK_P, BLOCK_C]
        x_hat, y, _, _ = _load_normed(
            x_ptr, norm_weight_ptr, norm_bias_ptr, stats_ptr, image, position, channel, mask, image_stride,
            outer_stride, C, GROUPS, CHANNELS_LAST,
        )  # fmt: skip
        grad_logit = _load_grad_logit(grad_ptr, p_ptr, image, position, length)  # [BLOCK_P]
        # Without the factor out_weight, which the whole channel has in common: the next kernel multiplies by it.
        grad_y = grad_logit[:, None] * silu_derivative(y)  # [BLOCK_P, BLOCK_C]
        norm_weight_sum += grad_y * x_hat
        norm_bias_sum += grad_y
        out_weight_sum += grad_logit[:, None] * silu(y)
        out_bias_sum += grad_logit
        position += BLOCK_P
    part = image * tl.num_programs(1) + split
    target = partial_ptr + part * 3 * C + channel
    tl.store(target, tl.sum(norm_weight_sum, axis=0), mask=channel < C)
    tl.store(target + C, tl.sum(norm_bias_sum, axis=0), mask=channel < C)
    tl.store(target + 2 * C, tl.sum(out_weight_sum, axis=0), mask=channel < C)
    if tl.program_id(2) == 0:
        tl.store(bias_partial_ptr + part, tl.sum(out_bias_sum, axis=0))


@triton.jit(do_not_specialize=["length", "splits"])
def _predictability_combine_kernel(
    partial_ptr,  # (images, splits, 3, C) float32
    norm_weight_ptr,  # (C,) float
    out_weight_ptr,  # (C,) float
    sums_ptr,  # (images, 3, C) float32: gradients of norm weight, norm bias and out weight
    means_ptr,  # (images, 2, GROUPS) float32: mean(grad_hat) and mean(grad_hat x_hat)
    length, splits, C: tl.constexpr, GROUPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per image and group."""
    WIDTH: tl.constexpr = C // GROUPS
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    channel = group * WIDTH + col
    norm_weight_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    norm_bias_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    out_weight_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        mask = (split < splits)[:, None] & (col < WIDTH)[None, :]  # [BLOCK_S, BLOCK_C]
        source = partial_ptr + (image * splits + split)[:, None] * (3 * C) + channel[None, :]
        norm_weight_sum += tl.sum(tl.load(source, mask=mask, other=0.0), axis=0)
        norm_bias_sum += tl.sum(tl.load(source + C, mask=mask, other=0.0), axis=0)
        out_weight_sum += tl.sum(tl.load(source + 2 * C, mask=mask, other=0.0), axis=0)
    out_weight = tl.load(out_weight_ptr + channel, mask=col < WIDTH, other=0.0).to(tl.float32)
    norm_weight_sum *= out_weight
    norm_bias_sum *= out_weight
    target = sums_ptr + image * 3 * C + channel
    tl.store(target, norm_weight_sum, mask=col < WIDTH)
    tl.store(target + C, norm_bias_sum, mask=col < WIDTH)
    tl.store(target + 2 * C, out_weight_sum, mask=col < WIDTH)
    norm_weight = tl.load(norm_weight_ptr + channel, mask=col < WIDTH, other=0.0).to(tl.float32)
    mean = means_ptr + image * 2 * GROUPS + group
    tl.store(mean, tl.sum(norm_weight * norm_bias_sum, axis=0) / length / WIDTH)
    tl.store(mean + GROUPS, tl.sum(norm_weight * norm_weight_sum, axis=0) / length / WIDTH)


@triton.jit(do_not_specialize=["length"])
def _predictability_bwd_kernel(
    grad_ptr,  # (images, length) float: gradient of p
    x_ptr,  # (images, C, length) float
    norm_weight_ptr,  # (C,) float
    norm_bias_ptr,  # (C,) float
    out_weight_ptr,  # (C,) float
    p_ptr,  # (images, length) float32
    stats_ptr,  # (images, 2, GROUPS) float32
    means_ptr,  # (images, 2, GROUPS) float32: mean(grad_hat) and mean(grad_hat x_hat)
    grad_x_ptr,  # (images, C, length) in x's dtype, without gaps: strides length C, grad_outer_stride and 1
    length, image_stride, outer_stride, grad_outer_stride, C: tl.constexpr, GROUPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, DIVISOR: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    length = length // DIVISOR * DIVISOR
    image, block = _image_and_block(length, BLOCK_P)
    position = block * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    mask = (position < length)[:, None] & (channel < C)[None, :]  # [BLOCK_P, BLOCK_C]
    x_hat, y, norm_weight, rstd = _load_normed(
        x_ptr, norm_weight_ptr, norm_bias_ptr, stats_ptr, image, position, channel, mask, image_stride,
        outer_stride, C, GROUPS, CHANNELS_LAST,
    )  # fmt: skip
    grad_logit = _load_grad_logit(grad_ptr, p_ptr, image, position, length)  # [BLOCK_P]
    out_weight = tl.load(out_weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    group_means_ptr = means_ptr + image * 2 * GROUPS + channel // (C // GROUPS)
    mean_grad = tl.load(group_means_ptr, mask=channel < C, other=0.0)  # [BLOCK_C]
    mean_grad_x_hat = tl.load(group_means_ptr + GROUPS, mask=channel < C, other=0.0)
    grad_hat = grad_logit[:, None] * (norm_weight * out_weight)[None, :] * silu_derivative(y)
    grad_x = rstd[None, :] * (grad_hat - mean_grad[None, :] - x_hat * mean_grad_x_hat[None, :])  # [BLOCK_P, BLOCK_C]
    pointer = grad_x_ptr + image * length * C + _offsets(position, channel, grad_outer_stride, CHANNELS_LAST)
    tl.store(pointer, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


class _MemoryFormat(NamedTuple):
    """Strides of (B, C, L) features, as every kernel above gets them."""

    channels_last: bool
    image_stride: int
    outer_stride: int
    divisor: int
    """A divisor of L that the compiler may know. It keeps vector loads along the positions under a mask."""


def _memory_format(x: Tensor) -> _MemoryFormat:
    channels_last = x.stride(1) == 1
    outer_stride = x.stride(2) if channels_last else x.stride(1)
    return _MemoryFormat(channels_last, x.stride(0), outer_stride, 1 if x.shape[2] % 16 else 16)


def predictability_fwd(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, out_weight: Tensor, out_bias: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(B, C, L) features, unit stride over channels or positions; contiguous parameters (C,) and () -> p and stats.

    p is (B, L) float32; stats (B, 2, num_groups) float32 holds the mean and 1 / standard deviation of the groups.
    """
    images, channels, length = x.shape
    memory, block_g = _memory_format(x), next_power_of_2(num_groups)
    partial, split_length = _statistics(x, memory, num_groups)
    p = launch.empty((images, length), torch.float32, x.device)
    stats = launch.empty((images, 2, num_groups), torch.float32, x.device)
    config = _tile_config(x, memory)
    launch.launch(
        _predictability_score_kernel, (images * cdiv(length, config["BLOCK_P"]),),
        x, norm_weight, norm_bias, out_weight, out_bias, partial, p, stats,
        length, partial.shape[1], split_length, memory.image_stride, memory.outer_stride, eps,
        C=channels, GROUPS=num_groups, CHANNELS_LAST=memory.channels_last, DIVISOR=memory.divisor,
        BLOCK_S=min(MAX_SPLITS, max(1, 128 // block_g)), BLOCK_G=block_g, **config,
    )  # fmt: skip
    return p, stats


def predictability_bwd(
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, out_weight: Tensor, p: Tensor, stats: Tensor,
    need_features: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous (B, L) gradient of p -> gradients of the features, of the channel parameters and of the out bias.

    The first is (B, C, L) in the features' memory format, or (0,) if not needed. The second is (3, C) float32: norm
    weight, norm bias, out weight. The third is () float32.
    """
    images, channels, length = x.shape
    groups, memory = stats.shape[2], _memory_format(x)
    config = _tile_config(x, memory)
    shape = {"C": channels, "GROUPS": groups, "CHANNELS_LAST": memory.channels_last, "DIVISOR": memory.divisor}
    tiles = max(MIN_TILES, cdiv(length, MAX_SPLITS * config["BLOCK_P"]))
    splits, blocks = cdiv(length, tiles * config["BLOCK_P"]), cdiv(channels, config["BLOCK_C"])
    partial = launch.empty((images, splits, 3, channels), torch.float32, x.device)
    bias_partial = launch.empty((images, splits), torch.float32, x.device)
    launch.launch(
        _predictability_sums_kernel, (images, splits, blocks),
        grad, x, norm_weight, norm_bias, p, stats, partial, bias_partial,
        length, tiles, memory.image_stride, memory.outer_stride, **shape, **config,
    )  # fmt: skip
    sums = launch.empty((images, 3, channels), torch.float32, x.device)
    means = launch.empty((images, 2, groups), torch.float32, x.device)
    launch.launch(
        _predictability_combine_kernel, (images, groups), partial, norm_weight, out_weight, sums, means, length, splits,
        C=channels, GROUPS=groups, BLOCK_S=16, BLOCK_C=next_power_of_2(channels // groups), num_warps=4,
    )  # fmt: skip
    if need_features:
        grad_x = _dense_like(x, memory)
        launch.launch(
            _predictability_bwd_kernel, (images * cdiv(length, config["BLOCK_P"]), blocks),
            grad, x, norm_weight, norm_bias, out_weight, p, stats, means, grad_x,
            length, memory.image_stride, memory.outer_stride, channels if memory.channels_last else length,
            **shape, **config,
        )  # fmt: skip
    else:
        grad_x = launch.empty((0,), x.dtype, x.device)
    return grad_x, sums.sum(0), bias_partial.sum()


def _dense_like(x: Tensor, memory: _MemoryFormat) -> Tensor:
    """Uninitialised memory of x's shape and memory format, without gaps."""
    images, channels, length = x.shape
    if memory.channels_last:
        return launch.empty((images, length, channels), x.dtype, x.device).transpose(1, 2)
    return launch.empty((images, channels, length), x.dtype, x.device)


def _statistics(x: Tensor, memory: _MemoryFormat, groups: int) -> tuple[Tensor, int]:
    """Partial statistics (B, splits, 2, groups), and how many positions a split has."""
    images, channels, length = x.shape
    # Channels-last, the channels of all groups are adjacent and one program takes them all. Channels-first, it takes
    # one group.
    program_groups = groups if memory.channels_last else 1
    width = channels // groups
    while _membership(program_groups, width) > MAX_MEMBERSHIP and program_groups > 1:
        program_groups = cdiv(program_groups, 2)
    config = dict(launch.config_for("predictability_statistics", x.device, C=channels))
    block_c = next_power_of_2(program_groups * width)
    block_p = min(MAX_POSITIONS, max(1, config.pop("TILE") // block_c))
    tiles = max(cdiv(MIN_POSITIONS, block_p), cdiv(length, MAX_SPLITS * block_p))
    splits = cdiv(length, max(1, tiles * block_p))
    partial = launch.empty((images, splits, 2, groups), torch.float32, x.device)
    launch.launch(
        _predictability_statistics_kernel, (images, splits, cdiv(groups, program_groups)), x, partial,
        length, tiles, memory.image_stride, memory.outer_stride,
        C=channels, GROUPS=groups, PROGRAM_GROUPS=program_groups, CHANNELS_LAST=memory.channels_last,
        DIVISOR=memory.divisor, BLOCK_P=block_p, BLOCK_C=block_c, BLOCK_G=next_power_of_2(program_groups),
        **config,
    )  # fmt: skip
    return partial, tiles * block_p


def _membership(groups: int, width: int) -> int:
    return next_power_of_2(groups) * next_power_of_2(groups * width)


def _tile_config(x: Tensor, memory: _MemoryFormat) -> launch.Config:
    name = "predictability_channels_last" if memory.channels_last else "predictability_channels_first"
    config = launch.config_for(name, x.device, C=x.shape[1])
    return {**config, "BLOCK_C": min(config["BLOCK_C"], next_power_of_2(x.shape[1]))}
