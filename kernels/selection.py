"""Choose the tokens to keep, without a sort.

Every position has a *rank*: a unique integer that orders by p and then by position. Whatever an image keeps (p above
a threshold, all but the lowest few, the best k) is the top of that order, so one number per image, its *cut*, says it
all: a position is kept iff its rank is at least the cut. The cut that keeps a given number is found by bisection: count
the ranks at or above the middle, halve, and stop as soon as the count is right.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch

launch.set_default_configs("select", {"BLOCK": 1024, "num_warps": 8})
launch.set_default_configs("select_limit", {"BLOCK": 8192, "num_warps": 16})

# Beyond every rank: keys and positions both stay below 2^31 in size.
_LOWEST = tl.constexpr(-(1 << 62))
_HIGHEST = tl.constexpr(1 << 62)


@triton.jit
def _rank(p, at, positions):
    """int64 that orders by p, then by position. A p above t ranks at or above t at the position past the last."""
    bits = p.to(tl.float32).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # in the order of the floats, with -0.0 equal to 0.0
    return key.to(tl.int64) * positions + at


@triton.jit
def _ranks(p_ptr, at, stop, positions):
    p = tl.load(p_ptr + at, mask=at < stop, other=0.0)
    return tl.where(at < stop, _rank(p, at, positions), _LOWEST)


@triton.jit
def _floor(threshold, positions):
    return _rank(tl.full((), threshold, tl.float32), positions, positions)


@triton.jit
def _bounds(starts_ptr, image, images, length, positions, PACKED: tl.constexpr):
    """First and past-last position of an image; an empty range for the one past the last. Never outside of p, whatever
    unchecked starts say."""
    following = tl.minimum(image + 1, images)
    if PACKED:
        start = tl.maximum(tl.load(starts_ptr + image), 0)
        stop = tl.minimum(tl.load(starts_ptr + following), positions)
    else:
        start, stop = image.to(tl.int64) * length, following.to(tl.int64) * length
    return start.to(tl.int64), stop.to(tl.int64)


@triton.jit
def _count(p_ptr, start, stop, cut, positions, BLOCK: tl.constexpr):
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    for base in range(start, stop, BLOCK):
        rank = _ranks(p_ptr, base + tl.arange(0, BLOCK), stop, positions)  # [BLOCK]
        count += (rank >= cut).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _bisect(p_ptr, start, stop, low, high, count, wanted, positions, BLOCK: tl.constexpr):
    """The cut in [low, high] with ``wanted`` ranks at or above it; low has ``count`` of them, at least that many."""
    while (count != wanted) & (low < high):
        middle = low + (high - low + 1) // 2
        above = _count(p_ptr, start, stop, middle, positions, BLOCK)
        enough = above >= wanted
        count = tl.where(enough, above, count)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit(do_not_specialize=["positions", "images", "length", "budget"])
def _cut_kernel(
    p_ptr, starts_ptr, rho_ptr, cut_ptr, length_ptr, best_ptr, spare_ptr,
    positions, images, length, threshold, rho, budget,
    PACKED: tl.constexpr, BUDGET: tl.constexpr, PER_IMAGE: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per image: how many it keeps, and the cut that does."""
    image = tl.program_id(0)
    start, stop = _bounds(starts_ptr, image, images, length, positions, PACKED)
    floor = _LOWEST + 1 if BUDGET else _floor(threshold, positions)
    lowest = tl.full((BLOCK,), _HIGHEST, dtype=tl.int64)
    highest = tl.full((BLOCK,), _LOWEST, dtype=tl.int64)
    natural = tl.zeros((BLOCK,), dtype=tl.int32)
    for base in range(start, stop, BLOCK):
        rank = _ranks(p_ptr, base + tl.arange(0, BLOCK), stop, positions)  # [BLOCK]
        lowest = tl.minimum(lowest, tl.where(rank >= floor, rank, _HIGHEST))
        highest = tl.maximum(highest, rank)
        natural += (rank >= floor).to(tl.int32)
    # Where nothing is above the threshold, the best position stands in.
    best = tl.max(highest)
    low = tl.minimum(tl.min(lowest), best)
    count = tl.maximum(tl.sum(natural), (stop > start).to(tl.int32))
    if BUDGET:
        wanted = tl.minimum(budget, count)
    else:
        if PER_IMAGE:
            rho = tl.load(rho_ptr + image)
        # A fraction outside [0, 1) in a tensor cannot be refused without a sync; the image must keep 1 to count.
        wanted = tl.minimum(tl.maximum(count - (count.to(tl.float32) * rho).to(tl.int32), 1), count)
    cut = _bisect(p_ptr, start, stop, low, best + 1, count, wanted, positions, BLOCK)
    tl.store(cut_ptr + image, cut)
    tl.store(length_ptr + image, wanted)
    if CAPACITY:
        tl.store(best_ptr + image, best)
        for base in range(start, stop, BLOCK):
            at = base + tl.arange(0, BLOCK)  # [BLOCK]
            rank = _ranks(p_ptr, at, stop, positions)
            p = tl.load(p_ptr + at, mask=(rank >= cut) & (rank < best), other=float("-inf"))
            tl.store(spare_ptr + at, p.to(tl.float32), mask=at < stop)


@triton.jit(do_not_specialize=["positions", "images", "capacity"])
def _limit_kernel(
    spare_ptr, best_ptr, length_ptr, limit_ptr, overflow_ptr, positions, images, threshold, capacity,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the cut over the whole batch that fits what images can spare into the capacity."""
    kept = tl.zeros((BLOCK,), dtype=tl.int32)
    survivors = tl.zeros((BLOCK,), dtype=tl.int32)
    highest = tl.full((BLOCK,), _LOWEST, dtype=tl.int64)
    for base in range(0, images, BLOCK):
        image = base + tl.arange(0, BLOCK)  # [BLOCK]
        length = tl.load(length_ptr + image, mask=image < images, other=0)
        kept += length
        survivors += (length > 0).to(tl.int32)
        highest = tl.maximum(highest, tl.load(best_ptr + image, mask=image < images, other=_LOWEST))
    total = tl.sum(kept)
    spare = total - tl.sum(survivors)
    overflow = tl.maximum(total - capacity, 0)
    limit = _bisect(
        spare_ptr, 0, positions.to(tl.int64), _floor(threshold, positions), tl.max(highest) + 1,
        spare, spare - overflow, positions, BLOCK,
    )  # fmt: skip
    tl.store(limit_ptr, limit)
    tl.store(overflow_ptr, overflow)


@triton.jit(do_not_specialize=["positions", "images", "length"])
def _raise_kernel(
    p_ptr, starts_ptr, cut_ptr, length_ptr, best_ptr, limit_ptr, positions, images, length,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per image: raise its cut to the limit of the batch, but keep its best, and count again."""
    image = tl.program_id(0)
    start, stop = _bounds(starts_ptr, image, images, length, positions, PACKED)
    cut = tl.maximum(tl.load(cut_ptr + image), tl.load(limit_ptr))
    cut = tl.minimum(cut, tl.load(best_ptr + image))
    tl.store(cut_ptr + image, cut)
    tl.store(length_ptr + image, _count(p_ptr, start, stop, cut, positions, BLOCK))


@triton.jit(do_not_specialize=["positions", "images", "length", "rows"])
def _compact_kernel(
    p_ptr, starts_ptr, cut_ptr, length_ptr,
    index_ptr, cu_seqlens_ptr, mask_ptr, natural_ptr, slot_ptr, size_ptr, overflow_ptr,
    positions, images, length, rows, threshold,
    PACKED: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per image, and one more for what follows the last: number the kept positions in order."""
    image = tl.program_id(0)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    everywhere = tl.zeros((BLOCK,), dtype=tl.int32)
    longest = tl.zeros((BLOCK,), dtype=tl.int32)
    for base in range(0, images, BLOCK):
        other = base + tl.arange(0, BLOCK)  # [BLOCK]
        kept = tl.load(length_ptr + other, mask=other < images, other=0)
        before += tl.where(other < image, kept, 0)
        everywhere += kept
        longest = tl.maximum(longest, kept)
    slot = tl.sum(before)
    total = tl.sum(everywhere)
    tl.store(cu_seqlens_ptr + image, slot)
    if image == images:
        tl.store(size_ptr, total)
        tl.store(size_ptr + 1, tl.max(longest))
        if not CAPACITY:
            tl.store(overflow_ptr, 0)

    start, stop = _bounds(starts_ptr, image, images, length, positions, PACKED)
    cut = tl.load(cut_ptr + image, mask=image < images, other=_HIGHEST)
    floor = _floor(threshold, positions)
    for base in range(start, stop, BLOCK):
        at = base + tl.arange(0, BLOCK)  # [BLOCK]
        rank = _ranks(p_ptr, at, stop, positions)
        keep = rank >= cut
        packed_rows = slot + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(mask_ptr + at, keep, mask=at < stop)
        tl.store(natural_ptr + at, rank >= floor, mask=at < stop)
        tl.store(slot_ptr + at, tl.where(keep, packed_rows, -1), mask=at < stop)
        tl.store(index_ptr + packed_rows, at, mask=keep & (packed_rows < rows))
        slot += tl.sum(keep.to(tl.int32))

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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Contiguous (B, L) p, or (S,) with int32 (B + 1,) cu_seqlens; float32 (B,) rho_per_image wins over rho.

    Returns:
        indices (rows,) int64, cu_seqlens (B + 1,), lengths (B,) int32, mask and natural_mask bool and packed_rows int32
        in the shape of p, sizes (2,) int32 = T and the longest length, overflow () int32. rows is the capacity, or
        budget * B, or without either the number of positions; indices past T are -1.
    """
    packed, limited, device = cu_seqlens is not None, capacity is not None, p.device
    images, length = (cu_seqlens.shape[0] - 1, 0) if packed else p.shape
    positions = p.numel()
    rows = capacity if limited else positions if budget is None else images * budget
    cuts, lengths = launch.empty((images,), torch.int64, device), launch.empty((images,), torch.int32, device)
    indices, starts = launch.empty((rows,), torch.int64, device), launch.empty((images + 1,), torch.int32, device)
    mask, natural = launch.empty(p.shape, torch.bool, device), launch.empty(p.shape, torch.bool, device)
    packed_rows, sizes = launch.empty(p.shape, torch.int32, device), launch.empty((2,), torch.int32, device)
    overflow = launch.empty((), torch.int32, device)
    best = launch.empty((images,), torch.int64, device) if limited else cuts
    spare = launch.empty((positions,), torch.float32, device) if limited else cuts

    source = p if cu_seqlens is None else cu_seqlens
    config = launch.config_for("select", device)
    launch.launch(
        _cut_kernel, (images,), p, source, p if rho_per_image is None else rho_per_image, cuts, lengths, best, spare,
        positions, images, length, threshold, rho, budget or 0,
        PACKED=packed, BUDGET=budget is not None, PER_IMAGE=rho_per_image is not None, CAPACITY=limited, **config,
    )  # fmt: skip
    if limited:
        limit = launch.empty((1,), torch.int64, device)
        launch.launch(
            _limit_kernel, (1,), spare, best, lengths, limit, overflow, positions, images, threshold, capacity,
            **launch.config_for("select_limit", device),
        )  # fmt: skip
        launch.launch(
            _raise_kernel, (images,), p, source, cuts, lengths, best, limit, positions, images, length,
            PACKED=packed, **config,
        )  # fmt: skip
    launch.launch(
        _compact_kernel, (images + 1,), p, source, cuts, lengths,
        indices, starts, mask, natural, packed_rows, sizes, overflow,
        positions, images, length, rows, threshold, PACKED=packed, CAPACITY=limited, **config,
    )  # fmt: skip
    return indices, starts, lengths, mask, natural, packed_rows, sizes, overflow
