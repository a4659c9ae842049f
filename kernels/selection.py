"""Choose the tokens to keep, without a sort.

Every position has a *sort key*: a unique int64 that orders the positions by p, then by index. What an image keeps (the
p above a threshold, all but the lowest few, or the best k) is always the top of this order. One number per image
therefore describes the selection: its *top-k threshold*, the lowest sort key that it keeps.

    keep[i] = sort_key[i] >= topk_threshold[image of i]

Bisection finds the top-k threshold of a given count: count the sort keys at or above the middle of the interval, halve
the interval, stop as soon as the count is right.

Pass 1, one program per image: how many positions it keeps, and its top-k threshold. The last pass writes masks, indices
and packed rows by a prefix count. Between them, a capacity needs one threshold for the whole batch, the *cut*, that
drops the overflow:

- Pass 1 also counts, in a histogram of the image, the positions that a capacity may drop: all but the best.
- Pass 2 finds the bin in which the cut lies, and makes one list of the sort keys in that bin, the *candidates*.
- Pass 3 bisects the candidates, in each program anew, and raises the thresholds of the images to the cut.

So no program walks over the whole batch, as long as p is not nearly the same everywhere.

Tokens that always stay rank above all others: their p is replaced by a float above 1. A mask in place of p is a p of 0
and 1, of which an image may keep nothing.

In the comments at pointers, "float" is float32, bfloat16 or float16, or the uint8 of a mask. ``positions`` is the
number of entries of p.
"""

import functools
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch

# Below and above every sort key: the bits of p and the positions both stay below 2^31 in size.
_LOWEST = tl.constexpr(-(1 << 62))
_HIGHEST = tl.constexpr(1 << 62)

BINS = 64
_BINS = tl.constexpr(BINS)
_IMAGES = tl.constexpr(16)  # histograms that are read at a time
_PROGRAMS = 128  # at most, that list candidates: each reads all histograms
_ABOVE = tl.constexpr(2**30 - 1)  # takes the bits of a p in [0, 1] to those of a float between 1 and infinity


@triton.jit
def _ordered(p):
    """int64 in the order of the floats, with -0.0 equal to 0.0."""
    bits = p.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits).to(tl.int64)


@triton.jit
def _load_prob(
    p_ptr,  # (positions,) float
    always_ptr,  # (positions,) uint8, or None
    position, inside,
):  # fmt: skip
    """float32 p, 0 outside; of tokens that always stay numbers above 1, in the order of their p."""
    p = tl.load(p_ptr + position, mask=inside, other=0).to(tl.float32)
    if always_ptr is not None:
        always = tl.load(always_ptr + position, mask=inside, other=0) != 0
        bits = tl.minimum(tl.maximum(p, 0.0), 1.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF  # -0.0 is 0.0
        p = tl.where(always, (bits + _ABOVE).to(tl.float32, bitcast=True), p)
    return p


@triton.jit
def _sort_key(p, position, positions):
    """int64 that orders by p, then by position."""
    return _ordered(p) * positions + position


@triton.jit
def _bin(p, threshold, shift):
    """The bin of p in a histogram, in the order of p. A p below the threshold counts as in the first bin, and one above
    1 as in the last."""
    above = _ordered(p) - _ordered(tl.full((), threshold, tl.float32))
    return tl.minimum(tl.maximum(above >> shift, 0), _BINS - 1).to(tl.int32)


@triton.jit
def _threshold_key(threshold, positions):
    """A p is above the threshold if and only if its sort key is at or above this one."""
    return _sort_key(tl.full((), threshold, tl.float32), positions, positions)


@triton.jit
def _load_sort_keys(
    p_ptr,  # float p, or int64 sort keys
    always_ptr,  # uint8, or None
    position, stop, positions,
):  # fmt: skip
    if p_ptr.dtype.element_ty == tl.int64:
        return tl.load(p_ptr + position, mask=position < stop, other=_LOWEST)
    else:  # Without the else, Triton would compile both returns.
        p = _load_prob(p_ptr, always_ptr, position, position < stop)
        return tl.where(position < stop, _sort_key(p, position, positions), _LOWEST)


@triton.jit
def _image_bounds(
    starts_ptr,  # (images + 1,) int32; unused if not PACKED
    image, images, length, positions, PACKED: tl.constexpr,
):  # fmt: skip
    """First position of an image and the one after its last; an empty range for image number ``images``.

    Clamped, because on a GPU nothing checks the starts: the range is never outside of p.
    """
    following = tl.minimum(image + 1, images)
    if PACKED:
        start = tl.maximum(tl.load(starts_ptr + image), 0)
        stop = tl.minimum(tl.load(starts_ptr + following), positions)
    else:
        start, stop = image.to(tl.int64) * length, following.to(tl.int64) * length
    return start.to(tl.int64), stop.to(tl.int64)


@triton.jit
def _count_from(p_ptr, always_ptr, start, stop, key, positions, BLOCK: tl.constexpr):
    """How many sort keys are at or above ``key``."""
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    for base in range(start, stop, BLOCK):
        sort_key = _load_sort_keys(p_ptr, always_ptr, base + tl.arange(0, BLOCK), stop, positions)  # [BLOCK]
        count += (sort_key >= key).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _bisect(p_ptr, always_ptr, start, stop, low, high, count, wanted, positions, BLOCK: tl.constexpr):
    """The key in [low, high] with ``wanted`` sort keys at or above it; at or above low there are ``count``."""
    while (count != wanted) & (low < high):
        middle = low + (high - low + 1) // 2
        count_middle = _count_from(p_ptr, always_ptr, start, stop, middle, positions, BLOCK)
        enough = count_middle >= wanted
        count = tl.where(enough, count_middle, count)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


launch.set_default_configs("select", {"BLOCK": 1024, "num_warps": 8})


@triton.jit(do_not_specialize=["positions", "images", "length", "budget", "max_seqlen", "shift"])
def _select_topk_kernel(
    p_ptr,  # (positions,) float
    always_ptr,  # (positions,) uint8: tokens that always stay; None without any
    starts_ptr,  # (images + 1,) int32; unused if not PACKED
    rho_ptr,  # (images,) float32; unused without PER_IMAGE
    topk_ptr,  # (images,) int64: writes the top-k threshold
    length_ptr,  # (images,) int32: writes how many positions the image keeps
    excess_ptr,  # (images,) int32: writes how many positions max_seqlen drops; None without it
    best_ptr,  # (images,) int64: writes the highest sort key; None without a capacity, like the next
    histogram_ptr,  # (images, BINS) int32: writes how many kept positions, but for the best, are in each bin
    positions, images, length, threshold, rho, budget, max_seqlen, shift,
    PACKED: tl.constexpr, BUDGET: tl.constexpr, PER_IMAGE: tl.constexpr, KEEP_BEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per image: how many positions it keeps, and its top-k threshold."""
    image = tl.program_id(0)
    start, stop = _image_bounds(starts_ptr, image, images, length, positions, PACKED)
    threshold_key = _LOWEST + 1 if BUDGET else _threshold_key(threshold, positions)
    lowest = tl.full((BLOCK,), _HIGHEST, dtype=tl.int64)  # of the sort keys above the threshold
    highest = tl.full((BLOCK,), _LOWEST, dtype=tl.int64)
    above = tl.zeros((BLOCK,), dtype=tl.int32)
    fixed = tl.zeros((BLOCK,), dtype=tl.int32)
    for base in range(start, stop, BLOCK):
        position = base + tl.arange(0, BLOCK)  # [BLOCK]
        sort_key = _load_sort_keys(p_ptr, always_ptr, position, stop, positions)
        lowest = tl.minimum(lowest, tl.where(sort_key >= threshold_key, sort_key, _HIGHEST))
        highest = tl.maximum(highest, sort_key)
        above += (sort_key >= threshold_key).to(tl.int32)
        if always_ptr is not None:
            fixed += (tl.load(always_ptr + position, mask=position < stop, other=0) != 0).to(tl.int32)
    best, low, count = tl.max(highest), tl.min(lowest), tl.sum(above)
    if KEEP_BEST:
        # If nothing is above the threshold, the best position is kept all the same.
        low, count = tl.minimum(low, best), tl.maximum(count, (stop > start).to(tl.int32))
    if BUDGET:
        wanted = tl.minimum(budget, count)
    else:
        if PER_IMAGE:
            rho = tl.load(rho_ptr + image)
        # A fraction in a tensor is not checked, because that would be a sync. So the result is clamped: 1 to count.
        chosen = count - tl.sum(fixed)
        wanted = tl.minimum(tl.maximum(count - (chosen.to(tl.float32) * rho).to(tl.int32), 1), count)
    if excess_ptr is not None:
        tl.store(excess_ptr + image, tl.maximum(wanted - max_seqlen, 0))
        wanted = tl.minimum(wanted, max_seqlen)
    topk_threshold = _bisect(p_ptr, always_ptr, start, stop, low, best + 1, count, wanted, positions, BLOCK)
    tl.store(topk_ptr + image, topk_threshold)
    tl.store(length_ptr + image, wanted)
    if histogram_ptr is not None:
        tl.store(best_ptr + image, best)
        histogram_ptr += image.to(tl.int64) * _BINS
        tl.store(histogram_ptr + tl.arange(0, _BINS), tl.zeros((_BINS,), tl.int32))
        tl.debug_barrier()  # before other threads of the program count
        for base in range(start, stop, BLOCK):
            position = base + tl.arange(0, BLOCK)  # [BLOCK]
            sort_key = _load_sort_keys(p_ptr, always_ptr, position, stop, positions)
            droppable = (sort_key >= topk_threshold) & (sort_key < best)
            p = _load_prob(p_ptr, always_ptr, position, droppable)
            tl.atomic_add(histogram_ptr + _bin(p, threshold, shift), 1, mask=droppable, sem="relaxed")


@triton.jit(do_not_specialize=["positions", "images", "length", "capacity", "shift"])
def _select_candidates_kernel(
    p_ptr,  # (positions,) float
    always_ptr,  # (positions,) uint8: tokens that always stay; None without any
    starts_ptr,  # (images + 1,) int32; unused if not PACKED
    topk_ptr,  # (images,) int64: top-k threshold
    length_ptr,  # (images,) int32: positions that the image keeps without a capacity
    excess_ptr,  # (images,) int32: positions that max_seqlen dropped; None without it
    best_ptr,  # (images,) int64: highest sort key
    histogram_ptr,  # (images, BINS) int32: kept positions, but for the best, in each bin
    candidate_ptr,  # (positions,) int64: writes the sort keys in the bin in which the cut lies
    cut_ptr,  # (2,) int32: writes how many candidates there are, and how many of them stay; both 0 without overflow
    overflow_ptr,  # () int32: writes how many positions max_seqlen and the capacity drop
    positions, images, length, threshold, capacity, shift, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program finds the bin in which the cut lies, and lists the candidates of its share of the images."""
    program = tl.program_id(0)
    kept = tl.zeros((BLOCK,), dtype=tl.int32)
    excess = tl.zeros((BLOCK,), dtype=tl.int32)
    for base in range(0, images, BLOCK):
        image = base + tl.arange(0, BLOCK)  # [BLOCK]
        kept += tl.load(length_ptr + image, mask=image < images, other=0)
        if excess_ptr is not None:
            excess += tl.load(excess_ptr + image, mask=image < images, other=0)
    overflow = tl.maximum(tl.sum(kept) - capacity, 0)
    if program == 0:
        tl.store(overflow_ptr, overflow + tl.sum(excess))
        tl.store(cut_ptr, 0)
        tl.store(cut_ptr + 1, 0)
    if overflow == 0:
        return

    images_each = tl.cdiv(images, tl.num_programs(0))
    first_image = program * images_each
    end_image = tl.minimum(first_image + images_each, images)
    bins = tl.arange(0, _BINS)  # [_BINS]
    in_all = tl.zeros((_BINS,), dtype=tl.int32)
    in_images_before = tl.zeros((_BINS,), dtype=tl.int32)
    for base in range(0, images, _IMAGES):
        image = base + tl.arange(0, _IMAGES)  # [_IMAGES]
        offset = image.to(tl.int64)[:, None] * _BINS + bins[None, :]
        count = tl.load(histogram_ptr + offset, mask=(image < images)[:, None], other=0)  # [_IMAGES, _BINS]
        in_all += tl.sum(count, 0)
        in_images_before += tl.sum(tl.where((image < first_image)[:, None], count, 0), 0)
    # Bins below the cut's are dropped whole. A capacity of at least one position per image leaves a bin for the cut.
    below = tl.cumsum(in_all, 0) < overflow
    bin_of_cut = tl.minimum(tl.sum(below.to(tl.int32)), _BINS - 1)
    # Clamped, because nothing checks the starts: images that overlap would list some positions twice.
    candidates = tl.minimum(tl.sum(tl.where(bins == bin_of_cut, in_all, 0)), positions)
    listed = tl.sum(tl.where(bins == bin_of_cut, in_images_before, 0))
    if program == 0:
        tl.store(cut_ptr, candidates)
        tl.store(cut_ptr + 1, candidates - (overflow - tl.sum(tl.where(bins < bin_of_cut, in_all, 0))))
    for number in range(end_image - first_image):
        image = first_image + number
        start, stop = _image_bounds(starts_ptr, image, images, length, positions, PACKED)
        topk_threshold, best = tl.load(topk_ptr + image), tl.load(best_ptr + image)
        for first in range(start, stop, BLOCK):
            position = first + tl.arange(0, BLOCK)  # [BLOCK]
            sort_key = _load_sort_keys(p_ptr, always_ptr, position, stop, positions)
            p = _load_prob(p_ptr, always_ptr, position, position < stop)
            candidate = (sort_key >= topk_threshold) & (sort_key < best)
            candidate = candidate & (_bin(p, threshold, shift) == bin_of_cut)
            index = listed + tl.cumsum(candidate.to(tl.int32), 0) - 1
            tl.store(candidate_ptr + index, sort_key, mask=candidate & (index < positions))
            listed += tl.sum(candidate.to(tl.int32))


@triton.jit(do_not_specialize=["positions", "images", "length"])
def _select_raise_kernel(
    p_ptr,  # (positions,) float
    always_ptr,  # (positions,) uint8: tokens that always stay; None without any
    starts_ptr,  # (images + 1,) int32; unused if not PACKED
    topk_ptr,  # (images,) int64: top-k threshold, raised in place
    length_ptr,  # (images,) int32: writes how many positions the image keeps
    best_ptr,  # (images,) int64: highest sort key
    candidate_ptr,  # (positions,) int64: sort keys among which the cut lies
    cut_ptr,  # (2,) int32: how many candidates there are, and how many of them stay
    positions, images, length, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per image: find the cut, raise the image's threshold to it, but keep its best, and count again."""
    image = tl.program_id(0)
    candidates = tl.load(cut_ptr)
    if candidates == 0:
        return
    lowest = tl.full((BLOCK,), _HIGHEST, dtype=tl.int64)
    highest = tl.full((BLOCK,), _LOWEST, dtype=tl.int64)
    for base in range(0, candidates, BLOCK):
        index = base + tl.arange(0, BLOCK)  # [BLOCK]
        sort_key = _load_sort_keys(candidate_ptr, None, index, candidates, positions)
        lowest = tl.minimum(lowest, tl.where(index < candidates, sort_key, _HIGHEST))
        highest = tl.maximum(highest, sort_key)
    cut = _bisect(
        candidate_ptr, None, 0, candidates, tl.min(lowest), tl.max(highest) + 1, candidates, tl.load(cut_ptr + 1),
        positions, BLOCK,
    )  # fmt: skip
    start, stop = _image_bounds(starts_ptr, image, images, length, positions, PACKED)
    topk_threshold = tl.maximum(tl.load(topk_ptr + image), tl.minimum(cut, tl.load(best_ptr + image)))
    tl.store(topk_ptr + image, topk_threshold)
    tl.store(length_ptr + image, _count_from(p_ptr, always_ptr, start, stop, topk_threshold, positions, BLOCK))


@triton.jit(do_not_specialize=["positions", "images", "length", "rows"])
def _select_compact_kernel(
    p_ptr,  # (positions,) float
    always_ptr,  # (positions,) uint8: tokens that always stay; None without any
    starts_ptr,  # (images + 1,) int32; unused if not PACKED
    topk_ptr,  # (images,) int64: top-k threshold
    length_ptr,  # (images,) int32: positions that the image keeps
    index_ptr,  # (rows,) int64: writes the position of each packed row, -1 in padding rows
    cu_seqlens_ptr,  # (images + 1,) int32
    mask_ptr,  # (positions,) bool: kept
    natural_ptr,  # (positions,) bool: p above the threshold
    packed_row_ptr,  # (positions,) int32: -1 where not kept
    size_ptr,  # (2,) int32: kept positions of the batch, and of the image that keeps most
    excess_ptr,  # (images,) int32: positions that max_seqlen dropped; None without it
    overflow_ptr,  # () int32: writes their sum; unused with CAPACITY
    positions, images, length, rows, threshold,
    PACKED: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per image, and one more for the end of cu_seqlens: number the kept positions in their order."""
    image = tl.program_id(0)
    kept_before = tl.zeros((BLOCK,), dtype=tl.int32)
    kept_everywhere = tl.zeros((BLOCK,), dtype=tl.int32)
    longest = tl.zeros((BLOCK,), dtype=tl.int32)
    excess = tl.zeros((BLOCK,), dtype=tl.int32)
    for base in range(0, images, BLOCK):
        other = base + tl.arange(0, BLOCK)  # [BLOCK]
        if excess_ptr is not None:
            excess += tl.load(excess_ptr + other, mask=other < images, other=0)
        kept = tl.load(length_ptr + other, mask=other < images, other=0)
        kept_before += tl.where(other < image, kept, 0)
        kept_everywhere += kept
        longest = tl.maximum(longest, kept)
    prefix_count = tl.sum(kept_before)
    total = tl.sum(kept_everywhere)
    tl.store(cu_seqlens_ptr + image, prefix_count)
    if image == images:
        tl.store(size_ptr, total)
        tl.store(size_ptr + 1, tl.max(longest))
        if not CAPACITY:
            tl.store(overflow_ptr, tl.sum(excess))

    start, stop = _image_bounds(starts_ptr, image, images, length, positions, PACKED)
    topk_threshold = tl.load(topk_ptr + image, mask=image < images, other=_HIGHEST)
    threshold_key = _threshold_key(threshold, positions)
    for base in range(start, stop, BLOCK):
        position = base + tl.arange(0, BLOCK)  # [BLOCK]
        sort_key = _load_sort_keys(p_ptr, None, position, stop, positions)
        natural = sort_key >= threshold_key
        if always_ptr is not None:
            sort_key = _load_sort_keys(p_ptr, always_ptr, position, stop, positions)
        keep = sort_key >= topk_threshold
        packed_row = prefix_count + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(mask_ptr + position, keep, mask=position < stop)
        tl.store(natural_ptr + position, natural, mask=position < stop)
        tl.store(packed_row_ptr + position, tl.where(keep, packed_row, -1), mask=position < stop)
        tl.store(index_ptr + packed_row, position, mask=keep & (packed_row < rows))
        prefix_count += tl.sum(keep.to(tl.int32))

    # The programs share the padding rows.
    for base in range(total + image * BLOCK, rows, (images + 1) * BLOCK):
        padding = base + tl.arange(0, BLOCK)  # [BLOCK]
        tl.store(index_ptr + padding, tl.full((BLOCK,), -1, dtype=tl.int64), mask=padding < rows)


def select_fwd(
    p: Tensor,
    cu_seqlens: Tensor | None,
    threshold: float,
    rho: float,
    rho_per_image: Tensor | None,
    budget: int | None,
    capacity: int | None,
    max_seqlen: int | None,
    always: Tensor | None,
    keep_best: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Contiguous (B, L) p, or (S,) with int32 (B + 1,) cu_seqlens; float32 (B,) rho_per_image replaces rho.

    p may be the uint8 of a mask. always is the contiguous uint8 of a mask of tokens that rank above all others.
    Without keep_best, an image in which nothing is above the threshold keeps nothing.

    Returns:
        indices (rows,) int64, cu_seqlens (B + 1,), lengths (B,) int32, mask and natural_mask bool and packed_rows int32
        in the shape of p, sizes (2,) int32 = T and the longest length, overflow () int32. rows is the capacity, or
        budget * B, or without either the number of positions; indices past T are -1.
    """
    packed, limited, device = cu_seqlens is not None, capacity is not None, p.device
    images, length = (cu_seqlens.shape[0] - 1, 0) if packed else p.shape
    positions = p.numel()
    rows = capacity if limited else positions if budget is None else images * budget
    topk, lengths = launch.empty((images,), torch.int64, device), launch.empty((images,), torch.int32, device)
    indices, starts = launch.empty((rows,), torch.int64, device), launch.empty((images + 1,), torch.int32, device)
    mask, natural = launch.empty(p.shape, torch.bool, device), launch.empty(p.shape, torch.bool, device)
    packed_rows, sizes = launch.empty(p.shape, torch.int32, device), launch.empty((2,), torch.int32, device)
    overflow = launch.empty((), torch.int32, device)
    excess = None if max_seqlen is None else launch.empty((images,), torch.int32, device)
    best = launch.empty((images,), torch.int64, device) if limited else None
    histogram = launch.empty((images, BINS), torch.int32, device) if limited else None
    shift = _shift(threshold)

    source = p if cu_seqlens is None else cu_seqlens
    config = launch.config_for("select", device)
    launch.launch(
        _select_topk_kernel, (images,), p, always, source, p if rho_per_image is None else rho_per_image, topk, lengths,
        excess, best, histogram, positions, images, length, threshold, rho, budget or 0, max_seqlen or 0, shift,
        PACKED=packed, BUDGET=budget is not None, PER_IMAGE=rho_per_image is not None, KEEP_BEST=keep_best, **config,
    )  # fmt: skip
    if limited:
        candidates = launch.empty((positions,), torch.int64, device)
        cut = launch.empty((2,), torch.int32, device)
        launch.launch(
            _select_candidates_kernel, (max(1, min(images, _PROGRAMS)),), p, always, source, topk, lengths, excess,
            best, histogram, candidates, cut, overflow, positions, images, length, threshold, capacity, shift,
            PACKED=packed, **config,
        )  # fmt: skip
        launch.launch(
            _select_raise_kernel, (images,), p, always, source, topk, lengths, best, candidates, cut,
            positions, images, length, PACKED=packed, **config,
        )  # fmt: skip
    launch.launch(
        _select_compact_kernel, (images + 1,), p, always, source, topk, lengths,
        indices, starts, mask, natural, packed_rows, sizes, excess, overflow,
        positions, images, length, rows, threshold, PACKED=packed, CAPACITY=limited, **config,
    )  # fmt: skip
    return indices, starts, lengths, mask, natural, packed_rows, sizes, overflow


@functools.cache
def _shift(threshold: float) -> int:
    """By how much to shift the float32 bits of p above those of the threshold, so that 1 is in the last bin."""
    one, least = (struct.unpack("i", struct.pack("f", value))[0] for value in (1.0, threshold))
    return max(0, (one - least - 1).bit_length() - (BINS - 1).bit_length())
