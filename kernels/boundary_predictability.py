"""Tail of the predictability router: group norm, SiLU, dot product over channels and sigmoid, one number per position.

Forward reads the features twice (statistics, score), backward twice more (sums, gradient). Channels may lie side by
side (channels-last) or positions may; a tile is [positions, channels] either way and only the addresses differ.
``pitch`` is the distance between positions in the first case, between channels in the second. All splits of an image
depend on its own size alone, so an image does not feel its batch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import cdiv

launch.set_default_configs("predictability_statistics", C={256: {"TILE": 8192, "num_warps": 8}})
launch.set_default_configs("predictability_rows", C={256: {"BLOCK_P": 16, "BLOCK_C": 128, "num_warps": 4}})
launch.set_default_configs("predictability_planes", C={256: {"BLOCK_P": 64, "BLOCK_C": 32, "num_warps": 4}})

MAX_SPLITS = 128
"""Partial statistics of one image, at most: one image alone still fills a GPU, and combining them stays small."""

MIN_TILES = 4
"""Tiles that share one partial sum of the backward, at least: three numbers per channel are written for each."""

MAX_POSITIONS = 256
"""Positions in a tile of the statistics, at most, however few channels there are."""

MEMBERSHIP = 8192
"""Groups x channels one statistics program may sort into groups."""


@triton.jit
def _offsets(position, channel, pitch, CHANNELS_LAST: tl.constexpr):
    """[BLOCK_P, BLOCK_C] offsets inside an image."""
    if CHANNELS_LAST:
        return position[:, None] * pitch + channel[None, :]
    return channel[None, :] * pitch + position[:, None]


@triton.jit
def _load_shift(x_ptr, image, group, mask, image_stride, pitch, WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """One feature of each group. Distances from it keep their digits where the features are far from zero."""
    channel = group.to(tl.int64) * WIDTH
    offset = channel if CHANNELS_LAST else channel * pitch
    return tl.load(x_ptr + image * image_stride + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length", "tiles"])
def _statistics_kernel(
    x_ptr, partial_ptr, length, tiles, image_stride, pitch, C: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Mean, less the shift, and sum of squared deviations of SHARE groups over one split of one image."""
    WIDTH: tl.constexpr = C // GROUPS
    image, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = length // UNIT * UNIT
    col = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    channel = tl.program_id(2).to(tl.int64) * SHARE * WIDTH + col
    real = (col < SHARE * WIDTH) & (channel < C)
    position = split * tiles * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]

    shift = _load_shift(x_ptr, image, channel // WIDTH, real, image_stride, pitch, WIDTH, CHANNELS_LAST)  # [BLOCK_C]
    # Welford in every slot of the tile; packed_rows and channels are merged once at the end.
    mean = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    count = tl.zeros((BLOCK_P,), dtype=tl.float32)
    for _ in range(tiles):
        mask = (position < length)[:, None] & real[None, :]
        pointer = x_ptr + image * image_stride + _offsets(position, channel, pitch, CHANNELS_LAST)
        x = tl.load(pointer, mask=mask, other=0.0).to(tl.float32) - shift[None, :]
        count += (position < length).to(tl.float32)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / tl.maximum(count, 1.0))[:, None]
        square += delta * (x - mean)
        position += BLOCK_P

    total = tl.sum(count, axis=0)
    channel_mean = tl.sum(mean * count[:, None], axis=0) / total  # [BLOCK_C]
    away = mean - channel_mean[None, :]
    channel_square = tl.sum(square + count[:, None] * away * away, axis=0)
    group = tl.arange(0, BLOCK_G)  # [BLOCK_G]
    member = (group[:, None] == (col // WIDTH)[None, :]) & real[None, :]  # [BLOCK_G, BLOCK_C]
    group_mean = tl.sum(tl.where(member, channel_mean[None, :], 0.0), axis=1) / WIDTH
    away = channel_mean[None, :] - group_mean[:, None]
    group_square = tl.sum(tl.where(member, channel_square[None, :] + total * away * away, 0.0), axis=1)

    group = tl.program_id(2) * SHARE + group
    wanted = (tl.arange(0, BLOCK_G) < SHARE) & (group < GROUPS)
    target = partial_ptr + (image * tl.num_programs(1) + split) * 2 * GROUPS + group
    tl.store(target, group_mean, mask=wanted)
    tl.store(target + GROUPS, group_square, mask=wanted)


@triton.jit
def _combine_statistics(
    partial_ptr, image, length, splits, span, eps, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """[BLOCK_G] mean, less the shift, and reciprocal standard deviation of an image's groups."""
    group = tl.arange(0, BLOCK_G)
    base = partial_ptr + image * splits * 2 * GROUPS + group[None, :]
    mean = tl.zeros((BLOCK_G,), dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        mask = (split < splits)[:, None] & (group < GROUPS)[None, :]
        count = tl.maximum(tl.minimum(length - split * span, span), 0).to(tl.float32)
        part = tl.load(base + (split * 2 * GROUPS)[:, None], mask=mask, other=0.0)
        mean += tl.sum(part * count[:, None], axis=0)
    mean /= length
    square = tl.zeros((BLOCK_G,), dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        mask = (split < splits)[:, None] & (group < GROUPS)[None, :]
        count = tl.maximum(tl.minimum(length - split * span, span), 0).to(tl.float32)
        away = tl.load(base + (split * 2 * GROUPS)[:, None], mask=mask, other=0.0) - mean[None, :]
        part = tl.load(base + (split * 2 * GROUPS + GROUPS)[:, None], mask=mask, other=0.0)
        square += tl.sum(part + WIDTH * count[:, None] * away * away, axis=0)
    return mean, 1.0 / tl.sqrt(square / length / WIDTH + eps)


@triton.jit
def _place(length, BLOCK_P: tl.constexpr):
    """Image of this program, and which block of its positions. Both on the first axis: the others end at 65,535."""
    blocks = tl.cdiv(length, BLOCK_P)
    return (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)


@triton.jit(do_not_specialize=["length", "splits", "span"])
def _score_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, out_weight_ptr, out_bias_ptr, partial_ptr, p_ptr, stats_ptr,
    length, splits, span, image_stride, pitch, eps, C: tl.constexpr, GROUPS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = C // GROUPS
    length = length // UNIT * UNIT
    image, block = _place(length, BLOCK_P)
    group = tl.arange(0, BLOCK_G)  # [BLOCK_G]
    mean, rstd = _combine_statistics(partial_ptr, image, length, splits, span, eps, WIDTH, GROUPS, BLOCK_S, BLOCK_G)
    mean += _load_shift(x_ptr, image, group, group < GROUPS, image_stride, pitch, WIDTH, CHANNELS_LAST)
    if block == 0:
        tl.store(stats_ptr + image * 2 * GROUPS + group, mean, mask=group < GROUPS)
        tl.store(stats_ptr + image * 2 * GROUPS + GROUPS + group, rstd, mask=group < GROUPS)

    position = block * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    terms = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in tl.static_range(0, C, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)  # [BLOCK_C]
        real = channel < C
        mask = (position < length)[:, None] & real[None, :]
        pointer = x_ptr + image * image_stride + _offsets(position, channel.to(tl.int64), pitch, CHANNELS_LAST)
        x = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + channel, mask=real, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + channel, mask=real, other=0.0).to(tl.float32)
        out_weight = tl.load(out_weight_ptr + channel, mask=real, other=0.0).to(tl.float32)
        group = tl.minimum(channel // WIDTH, GROUPS - 1)
        scale = norm_weight * tl.gather(rstd, group, 0)
        y = (x - tl.gather(mean, group, 0)[None, :]) * scale[None, :] + norm_bias[None, :]
        terms += out_weight[None, :] * y * tl.sigmoid(y)
    p = tl.sigmoid(tl.sum(terms, axis=1) + tl.load(out_bias_ptr).to(tl.float32))
    forced = (position == 0) | (position == length - 1)
    tl.store(p_ptr + image * length + position, tl.where(forced, 1.0, p), mask=position < length)


@triton.jit
def _load_normed(
    x_ptr, norm_weight_ptr, norm_bias_ptr, stats_ptr, image, position, channel, mask, image_stride, pitch,
    C: tl.constexpr, GROUPS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The normalised tile, the same after the affine, and of each channel the affine's weight and 1 / deviation."""
    group = stats_ptr + image * 2 * GROUPS + channel // (C // GROUPS)
    real = channel < C
    mean = tl.load(group, mask=real, other=0.0)
    rstd = tl.load(group + GROUPS, mask=real, other=0.0)
    norm_weight = tl.load(norm_weight_ptr + channel, mask=real, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + channel, mask=real, other=0.0).to(tl.float32)
    pointer = x_ptr + image * image_stride + _offsets(position, channel, pitch, CHANNELS_LAST)
    x = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    normed = (x - mean[None, :]) * rstd[None, :]
    return normed, normed * norm_weight[None, :] + norm_bias[None, :], norm_weight, rstd


@triton.jit
def _logit_grad(grad_ptr, p_ptr, image, position, length):
    """Gradient before the last sigmoid. Forced positions have p = 1 exactly, so nothing passes there."""
    offset = image * length + position
    grad = tl.load(grad_ptr + offset, mask=position < length, other=0.0).to(tl.float32)
    p = tl.load(p_ptr + offset, mask=position < length, other=0.0)
    return tl.where(p == 1.0, 0.0, grad * p * (1.0 - p))


@triton.jit
def _silu_grad(y, gate):
    return gate * (1.0 + y * (1.0 - gate))


@triton.jit(do_not_specialize=["length", "tiles"])
def _sums_kernel(
    grad_ptr, x_ptr, norm_weight_ptr, norm_bias_ptr, out_weight_ptr, p_ptr, stats_ptr, partial_ptr, bias_partial_ptr,
    length, tiles, image_stride, pitch, C: tl.constexpr, GROUPS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Over one split, gradients of norm weight, norm bias and out weight for each channel, and of the out bias."""
    image, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    length = length // UNIT * UNIT
    channel = tl.program_id(2).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    position = split * tiles * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    out_weight = tl.load(out_weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    bias_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    out_sum = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    logit_sum = tl.zeros((BLOCK_P,), dtype=tl.float32)
    for _ in range(tiles):
        mask = (position < length)[:, None] & (channel < C)[None, :]
        normed, y, _, _ = _load_normed(
            x_ptr, norm_weight_ptr, norm_bias_ptr, stats_ptr, image, position, channel, mask, image_stride, pitch,
            C, GROUPS, CHANNELS_LAST,
        )  # fmt: skip
        slope = _logit_grad(grad_ptr, p_ptr, image, position, length)
        gate = tl.sigmoid(y)
        inner = slope[:, None] * _silu_grad(y, gate)
        weight_sum += inner * normed
        bias_sum += inner
        out_sum += slope[:, None] * y * gate
        logit_sum += slope
        position += BLOCK_P
    part = image * tl.num_programs(1) + split
    target = partial_ptr + part * 3 * C + channel
    # The out weight is a factor of the whole channel: once here instead of at every position.
    tl.store(target, tl.sum(weight_sum, axis=0) * out_weight, mask=channel < C)
    tl.store(target + C, tl.sum(bias_sum, axis=0) * out_weight, mask=channel < C)
    tl.store(target + 2 * C, tl.sum(out_sum, axis=0), mask=channel < C)
    if tl.program_id(2) == 0:
        tl.store(bias_partial_ptr + part, tl.sum(logit_sum, axis=0))


@triton.jit(do_not_specialize=["length", "splits"])
def _combine_sums_kernel(
    partial_ptr, norm_weight_ptr, sums_ptr, means_ptr, length, splits, C: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Per image the sums over the splits, and per group the two means that the norm takes back from its gradient."""
    WIDTH: tl.constexpr = C // GROUPS
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    channel = group * WIDTH + col
    weight_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    bias_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    out_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)  # [BLOCK_S]
        mask = (split < splits)[:, None] & (col < WIDTH)[None, :]
        source = partial_ptr + (image * splits + split)[:, None] * (3 * C) + channel[None, :]
        weight_sum += tl.sum(tl.load(source, mask=mask, other=0.0), axis=0)
        bias_sum += tl.sum(tl.load(source + C, mask=mask, other=0.0), axis=0)
        out_sum += tl.sum(tl.load(source + 2 * C, mask=mask, other=0.0), axis=0)
    target = sums_ptr + image * 3 * C + channel
    tl.store(target, weight_sum, mask=col < WIDTH)
    tl.store(target + C, bias_sum, mask=col < WIDTH)
    tl.store(target + 2 * C, out_sum, mask=col < WIDTH)
    norm_weight = tl.load(norm_weight_ptr + channel, mask=col < WIDTH, other=0.0).to(tl.float32)
    mean = means_ptr + image * 2 * GROUPS + group
    tl.store(mean, tl.sum(norm_weight * bias_sum, axis=0) / length / WIDTH)
    tl.store(mean + GROUPS, tl.sum(norm_weight * weight_sum, axis=0) / length / WIDTH)


@triton.jit(do_not_specialize=["length"])
def _features_grad_kernel(
    grad_ptr, x_ptr, norm_weight_ptr, norm_bias_ptr, out_weight_ptr, p_ptr, stats_ptr, means_ptr, dx_ptr,
    length, image_stride, pitch, dx_pitch, C: tl.constexpr, GROUPS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    length = length // UNIT * UNIT
    image, block = _place(length, BLOCK_P)
    position = block * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    mask = (position < length)[:, None] & (channel < C)[None, :]
    normed, y, norm_weight, rstd = _load_normed(
        x_ptr, norm_weight_ptr, norm_bias_ptr, stats_ptr, image, position, channel, mask, image_stride, pitch,
        C, GROUPS, CHANNELS_LAST,
    )  # fmt: skip
    slope = _logit_grad(grad_ptr, p_ptr, image, position, length)
    out_weight = tl.load(out_weight_ptr + channel, mask=channel < C, other=0.0).to(tl.float32)
    group = means_ptr + image * 2 * GROUPS + channel // (C // GROUPS)
    mean = tl.load(group, mask=channel < C, other=0.0)
    mean_normed = tl.load(group + GROUPS, mask=channel < C, other=0.0)
    inner = slope[:, None] * (norm_weight * out_weight)[None, :] * _silu_grad(y, tl.sigmoid(y))
    dx = rstd[None, :] * (inner - mean[None, :] - normed * mean_normed[None, :])
    pointer = dx_ptr + image * length * C + _offsets(position, channel, dx_pitch, CHANNELS_LAST)
    tl.store(pointer, dx.to(dx_ptr.dtype.element_ty), mask=mask)


class _Layout(NamedTuple):
    """How (B, C, L) features lie in memory: what every kernel above is told about it."""

    channels_last: bool
    image_stride: int
    pitch: int
    unit: int
    """A divisor of L that the compiler may know, so that masks do not break vector loads along positions."""


def _layout(x: Tensor) -> _Layout:
    channels_last = x.stride(1) == 1
    pitch = x.stride(2) if channels_last else x.stride(1)
    return _Layout(channels_last, x.stride(0), pitch, 1 if x.shape[2] % 16 else 16)


def predictability_fwd(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, out_weight: Tensor, out_bias: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(B, C, L) features, unit stride over channels or positions; contiguous parameters (C,) and () -> p and stats.

    p is (B, L) float32; stats (B, 2, num_groups) float32 holds the mean and 1 / standard deviation of the groups.
    """
    images, channels, length = x.shape
    layout, block_g = _layout(x), triton.next_power_of_2(num_groups)
    partial, span = _statistics(x, layout, num_groups)
    p = launch.empty((images, length), torch.float32, x.device)
    stats = launch.empty((images, 2, num_groups), torch.float32, x.device)
    config = _tile_config(x, layout)
    launch.launch(
        _score_kernel, (images * cdiv(length, config["BLOCK_P"]),), x, norm_weight, norm_bias, out_weight, out_bias,
        partial, p, stats, length, partial.shape[1], span, layout.image_stride, layout.pitch, eps,
        C=channels, GROUPS=num_groups, CHANNELS_LAST=layout.channels_last, UNIT=layout.unit,
        BLOCK_S=min(MAX_SPLITS, max(1, 1024 // block_g)), BLOCK_G=block_g, **config,
    )  # fmt: skip
    return p, stats


def predictability_bwd(
    grad: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, out_weight: Tensor, p: Tensor, stats: Tensor,
    need_features: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous (B, L) gradient of p -> gradients of the features (B, C, L), of (norm weight, norm bias, out weight)
    (3, C) and of out bias (), the last two in float32. The first has the features' memory order; (0,) if not needed."""
    images, channels, length = x.shape
    groups, layout, config = stats.shape[2], _layout(x), _tile_config(x, _layout(x))
    shape = {"C": channels, "GROUPS": groups, "CHANNELS_LAST": layout.channels_last, "UNIT": layout.unit}
    tiles = max(MIN_TILES, cdiv(length, MAX_SPLITS * config["BLOCK_P"]))
    splits, blocks = cdiv(length, tiles * config["BLOCK_P"]), cdiv(channels, config["BLOCK_C"])
    partial = launch.empty((images, splits, 3, channels), torch.float32, x.device)
    bias_partial = launch.empty((images, splits), torch.float32, x.device)
    launch.launch(
        _sums_kernel, (images, splits, blocks), grad, x, norm_weight, norm_bias, out_weight, p, stats, partial,
        bias_partial, length, tiles, layout.image_stride, layout.pitch, **shape, **config,
    )  # fmt: skip
    sums = launch.empty((images, 3, channels), torch.float32, x.device)
    means = launch.empty((images, 2, groups), torch.float32, x.device)
    launch.launch(
        _combine_sums_kernel, (images, groups), partial, norm_weight, sums, means, length, splits,
        C=channels, GROUPS=groups, BLOCK_S=16, BLOCK_C=triton.next_power_of_2(channels // groups), num_warps=4,
    )  # fmt: skip
    if need_features:
        dx = dense_like(x)
        launch.launch(
            _features_grad_kernel, (images * cdiv(length, config["BLOCK_P"]), blocks), grad, x, norm_weight, norm_bias,
            out_weight, p, stats, means, dx, length, layout.image_stride, layout.pitch,
            channels if layout.channels_last else length, **shape, **config,
        )  # fmt: skip
    else:
        dx = launch.empty((0,), x.dtype, x.device)
    return dx, sums.sum(0), bias_partial.sum()


def dense_like(x: Tensor) -> Tensor:
    """Unwritten memory of x's shape and memory order, without gaps."""
    images, channels, length = x.shape
    if _layout(x).channels_last:
        return launch.empty((images, length, channels), x.dtype, x.device).transpose(1, 2)
    return launch.empty((images, channels, length), x.dtype, x.device)


def _statistics(x: Tensor, layout: _Layout, groups: int) -> tuple[Tensor, int]:
    """Partial statistics (B, splits, 2, groups) of splits of so many positions."""
    images, channels, length = x.shape
    # A program takes all groups where their channels lie side by side, one where each channel is a row of its own.
    share = groups if layout.channels_last else 1
    width = channels // groups
    while triton.next_power_of_2(share) * triton.next_power_of_2(share * width) > MEMBERSHIP and share > 1:
        share = cdiv(share, 2)
    config = dict(launch.config_for("predictability_statistics", x.device, C=channels))
    block_c = triton.next_power_of_2(share * width)
    block_p = min(MAX_POSITIONS, max(1, config.pop("TILE") // block_c))
    tiles = cdiv(length, MAX_SPLITS * block_p)
    splits = cdiv(length, max(1, tiles * block_p))
    partial = launch.empty((images, splits, 2, groups), torch.float32, x.device)
    launch.launch(
        _statistics_kernel, (images, splits, cdiv(groups, share)), x, partial, length, tiles, layout.image_stride,
        layout.pitch, C=channels, GROUPS=groups, SHARE=share, CHANNELS_LAST=layout.channels_last, UNIT=layout.unit,
        BLOCK_P=block_p, BLOCK_C=block_c, BLOCK_G=triton.next_power_of_2(share), **config,
    )  # fmt: skip
    return partial, tiles * block_p


def _tile_config(x: Tensor, layout: _Layout) -> dict[str, int]:
    name = "predictability_rows" if layout.channels_last else "predictability_planes"
    config = launch.config_for(name, x.device, C=x.shape[1])
    return {**config, "BLOCK_C": min(config["BLOCK_C"], triton.next_power_of_2(x.shape[1]))}
