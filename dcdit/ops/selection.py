"""Token selection: from boundary probabilities to the kept tokens, in the packed order that later operations use."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops import checks
from dcdit.ops.autocast import without_autocast
from dcdit.ops.backend import backend_for
from dcdit.ops.token_selection import PendingSelection, TokenSelection
from dcdit.utils.text import shape_of

__all__ = ["select_from_mask", "select_tokens"]


def select_tokens(
    p: Tensor,
    cu_seqlens: Tensor | None = None,
    threshold: float = 0.5,
    drop_fraction: float | Tensor = 0.0,
    budget: int | None = None,
    capacity: int | None = None,
    max_seqlen: int | None = None,
    always: Tensor | None = None,
    extra_tokens: int = 0,
) -> TokenSelection:
    """Choose the tokens to keep (DC-DiT, arXiv 2603.06351: routing and elastic inference).

    The natural mask keeps p > threshold. Of the n tokens that an image keeps so, the
    ``floor(float32(n) * float32(drop_fraction))`` with the lowest p are dropped; among equal p the lower raster index
    is dropped first. A non-empty image always keeps its best token: the highest p, the last of equals. Not
    differentiable.

    Two kinds of tokens are kept whatever their p. Tokens of the grid that ``always`` names, such as those of text
    between images. And ``extra_tokens``, which lie outside of the grid, such as a class token or registers: the source
    is then (B, n + L, D) with the n of them first in each image, and the de-chunked result too.

    Args:
        p: (B, L), or (S,) with ``cu_seqlens``; probabilities in [0, 1].
        cu_seqlens: int32 or int64 (B+1,), sequence starts of a packed source.
        threshold: strict lower bound of the natural mask. The comparison is in float32 (for float64 p in float64), so
            the threshold is never rounded to half precision.
        drop_fraction: rho in [0, 1), one number or a (B,) tensor.
        budget: keep exactly this many tokens per image, those with the highest p. Every shape is then static. Excludes
            ``drop_fraction``, ``capacity`` and ``max_seqlen``.
        capacity: static size T of the packed buffer. If more tokens are kept, the lowest p of the batch are dropped and
            counted in ``overflow``. Unused rows are padding. Without budget and capacity, T is read back from the
            device.
        max_seqlen: most tokens of one image. An image that keeps more drops its lowest p, before a capacity looks at
            the batch; they count in ``overflow``. With a capacity it is the ``max_seqlen`` of the result, which is
            otherwise as large as an image: attention starts its programs for that length.
        always: bool, shape of p: tokens that rank above all others, among themselves by p. They are kept, count in
            budget, capacity and max_seqlen, and are dropped only where they alone are too many for a capacity or
            max_seqlen. The drop fraction neither counts nor drops them. They are no part of the natural mask, which
            tells what the router chose.
        extra_tokens: how many tokens of each image lie outside of the grid. They have no p, are never dropped, and
            count in budget, capacity and max_seqlen. Needs a grid batch.

    Raises:
        ValueError: NaN in p (on a GPU only with ``DCDIT_CHECK=1``), a fraction outside [0, 1), a budget above L, or
            below what ``always`` keeps in an image (on a GPU only with ``DCDIT_CHECK=1``), a capacity below B, a
            max_seqlen below 1, a negative number of extra tokens, a size that leaves no token of the grid beside
            them, or a bad shape.
        TypeError: p that is not floating point, ``always`` that is not bool, a size that is not an int.

    Example:
        >>> p = torch.tensor([[0.9, 0.2, 0.7, 0.6], [0.1, 0.3, 0.2, 0.2]])
        >>> ops.select_tokens(p).indices.tolist()
        [0, 2, 3, 5]
        >>> ops.select_tokens(p, budget=2, always=p == 0.2).indices.tolist()
        [0, 1, 6, 7]
        >>> sel = ops.select_tokens(p, budget=3, extra_tokens=1)
        >>> sel.indices.tolist(), sel.mask.shape
        ([0, 1, 3, 5, 7, 9], torch.Size([2, 5]))
    """
    return start_selection(
        p, cu_seqlens, threshold, drop_fraction, budget, capacity, max_seqlen, always, extra_tokens
    ).wait()


def select_from_mask(
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    capacity: int | None = None,
    max_seqlen: int | None = None,
    extra_tokens: int = 0,
) -> TokenSelection:
    """Keep the tokens of a mask, whoever made it. An image may keep none.

    What does not fit is dropped as by :func:`select_tokens` where all p are equal: the lower index first, but never the
    last token of an image. The natural mask of the result is the mask.

    Args:
        mask: bool (B, L), or (S,) with ``cu_seqlens``. A mask over the grid of each image, (B, H, W), is given as
            ``mask.flatten(1)``.
        cu_seqlens, capacity, max_seqlen, extra_tokens: as for :func:`select_tokens`. Without a capacity, T is read
            back from the device.

    Raises:
        ValueError: a bad shape or size, as for :func:`select_tokens`.
        TypeError: a mask that is not bool, a size that is not an int.

    Example:
        >>> sel = ops.select_from_mask(torch.tensor([[True, False, True], [False, False, False]]))
        >>> sel.indices.tolist(), sel.cu_seqlens.tolist()
        ([0, 2], [0, 2, 2])
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; accepted: bool")
    images = _check_source("mask", mask, cu_seqlens)
    _, capacity, max_seqlen = _check_sizes(images, mask, cu_seqlens, None, capacity, max_seqlen, extra_tokens)
    found = backend_for(mask).select_from_mask(mask, cu_seqlens, capacity, max_seqlen)
    return _pending(found, extra_tokens).wait()


def start_selection(
    p: Tensor,
    cu_seqlens: Tensor | None = None,
    threshold: float = 0.5,
    drop_fraction: float | Tensor = 0.0,
    budget: int | None = None,
    capacity: int | None = None,
    max_seqlen: int | None = None,
    always: Tensor | None = None,
    extra_tokens: int = 0,
) -> PendingSelection:
    """Start :func:`select_tokens` without waiting for the size, so that the device has other work when it is known."""
    checks.check_float(p=p)
    images = _check_source("p", p, cu_seqlens)
    drop_fraction = check_drop_fraction(drop_fraction, images, p)
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold is {threshold}; accepted: a number in [0, 1]")
    if budget is not None and (
        isinstance(drop_fraction, Tensor) or drop_fraction > 0 or capacity is not None or max_seqlen is not None
    ):
        raise ValueError(f"budget={budget} fixes every length; it excludes drop_fraction, capacity and max_seqlen")
    budget, capacity, max_seqlen = _check_sizes(images, p, cu_seqlens, budget, capacity, max_seqlen, extra_tokens)
    if always is not None:
        _check_always(always, p, cu_seqlens, budget)
    checks.check_no_nan(p)
    with without_autocast(p):
        found = backend_for(p).select_tokens(
            p.detach(), cu_seqlens, threshold, drop_fraction, budget, capacity, max_seqlen, always
        )
    return _pending(found, extra_tokens)


def _pending(found: TokenSelection | PendingSelection, extra_tokens: int) -> PendingSelection:
    # The reference does not divide the work.
    started = found if isinstance(found, PendingSelection) else PendingSelection(found, None)
    return started._replace(extra_tokens=extra_tokens) if extra_tokens else started


def _check_source(name: str, p: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of images."""
    if cu_seqlens is None:
        if p.dim() != 2:
            raise ValueError(f"{name} has shape {shape_of(p)}; accepted: (B, L), or (S,) together with cu_seqlens")
        return p.shape[0]
    if p.dim() != 1:
        raise ValueError(f"{name} has shape {shape_of(p)}; with cu_seqlens it must be (S,)")
    checks.check_cu_seqlens(cu_seqlens, p.shape[0])
    checks.check_device(**{name: p, "cu_seqlens": cu_seqlens})
    return cu_seqlens.shape[0] - 1


def check_drop_fraction(value: float | Tensor, images: int, p: Tensor) -> float | Tensor:
    """A number, or (images,) float32 on the device of p. ValueError for what is neither, or outside of [0, 1)."""
    if not isinstance(value, Tensor):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"drop_fraction is {value}; accepted: a number in [0, 1)")
        return float(value)
    if value.dim() == 0:
        value = value.expand(images)
    checks.check_shape("drop_fraction", value, (images,), "one fraction per image")
    checks.check_device(p=p, drop_fraction=value)
    if checks.value_checks_enabled(value) and not bool(((value >= 0) & (value < 1)).all()):
        raise ValueError(f"drop_fraction holds {value.tolist()[:8]}; accepted: numbers in [0, 1)")
    return value.to(torch.float32)


def _check_sizes(
    images: int,
    p: Tensor,
    cu_seqlens: Tensor | None,
    budget: int | None,
    capacity: int | None,
    max_seqlen: int | None,
    extra: int,
) -> tuple[int | None, int | None, int | None]:
    """What the extra tokens leave of the budget, the capacity and max_seqlen."""
    if extra:
        checks.check_count("extra_tokens", extra)
        if extra < 0 or cu_seqlens is not None:
            raise ValueError(f"extra_tokens is {extra}; accepted: 0 or more, for a grid batch (B, L) only")
    beside = f" beside {extra} extra tokens" if extra else ""
    if budget is not None:
        checks.check_count("budget", budget)
        shortest = p.shape[-1]
        if cu_seqlens is not None and images and checks.value_checks_enabled(p):
            shortest = int((cu_seqlens[1:] - cu_seqlens[:-1]).min())
        if not 1 <= budget - extra <= shortest:
            raise ValueError(
                f"budget is {budget}; accepted: {1 + extra} to {shortest + extra}, the positions of the shortest image"
                f"{beside}"
            )
        budget -= extra
    if capacity is not None:
        checks.check_count("capacity", capacity)
        if capacity < images * (1 + extra):
            raise ValueError(
                f"capacity is {capacity}; accepted: at least {images * (1 + extra)}, one token for each image{beside}"
            )
        capacity -= images * extra
    if max_seqlen is not None:
        checks.check_count("max_seqlen", max_seqlen)
        if max_seqlen < 1 + extra:
            raise ValueError(
                f"max_seqlen is {max_seqlen}; accepted: at least {1 + extra}, for every image keeps its best token"
                f"{beside}"
            )
        max_seqlen -= extra
    return budget, capacity, max_seqlen


def _check_always(always: Tensor, p: Tensor, cu_seqlens: Tensor | None, budget: int | None) -> None:
    if always.dtype != torch.bool:
        raise TypeError(f"always has dtype {always.dtype}; accepted: bool")
    checks.check_shape("always", always, tuple(p.shape), "the shape of p")
    checks.check_device(p=p, always=always)
    if budget is None or not checks.value_checks_enabled(p) or p.numel() == 0:
        return
    counts = always.sum(1) if cu_seqlens is None else F.pad(always.cumsum(0), (1, 0))[cu_seqlens.long()].diff()
    if (most := int(counts.max())) > budget:
        raise ValueError(f"always keeps {most} tokens of an image; accepted: no more than the budget leaves, {budget}")
