"""Token selection: from boundary probabilities to the kept tokens, in the packed order that later operations use."""

import torch
from torch import Tensor

from dcdit.ops import checks
from dcdit.ops.autocast import without_autocast
from dcdit.ops.backend import backend_for
from dcdit.ops.token_selection import PendingSelection, TokenSelection
from dcdit.utils.text import shape_of

__all__ = ["select_tokens"]


def select_tokens(
    p: Tensor,
    cu_seqlens: Tensor | None = None,
    threshold: float = 0.5,
    drop_fraction: float | Tensor = 0.0,
    budget: int | None = None,
    capacity: int | None = None,
    max_seqlen: int | None = None,
) -> TokenSelection:
    """Choose the tokens to keep (DC-DiT, arXiv 2603.06351: routing and elastic inference).

    The natural mask keeps p > threshold. Of the n tokens that an image keeps so, the
    ``floor(float32(n) * float32(drop_fraction))`` with the lowest p are dropped; among equal p the lower raster index
    is dropped first. A non-empty image always keeps its best token: the highest p, the last of equals. Not
    differentiable.

    Args:
        p: (B, L), or (S,) with ``cu_seqlens``; probabilities in [0, 1].
        cu_seqlens: int32 (B+1,), sequence starts of a packed source.
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

    Raises:
        ValueError: NaN in p (on a GPU only with ``DCDIT_CHECK=1``), a fraction outside [0, 1), a budget above L, a
            capacity below B, a max_seqlen below 1, or a bad shape.
        TypeError: p that is not floating point, a budget, a capacity or a max_seqlen that is not an int.
    """
    return start_selection(p, cu_seqlens, threshold, drop_fraction, budget, capacity, max_seqlen).wait()


def start_selection(
    p: Tensor,
    cu_seqlens: Tensor | None = None,
    threshold: float = 0.5,
    drop_fraction: float | Tensor = 0.0,
    budget: int | None = None,
    capacity: int | None = None,
    max_seqlen: int | None = None,
) -> PendingSelection:
    """Start :func:`select_tokens` without waiting for the size, so that the device has other work when it is known."""
    checks.check_float(p=p)
    if cu_seqlens is None and p.dim() != 2:
        raise ValueError(f"p has shape {shape_of(p)}; accepted: (B, L), or (S,) together with cu_seqlens")
    if cu_seqlens is not None:
        if p.dim() != 1:
            raise ValueError(f"p has shape {shape_of(p)}; with cu_seqlens it must be (S,)")
        checks.check_device(p=p, cu_seqlens=cu_seqlens)
        checks.check_cu_seqlens(cu_seqlens, p.shape[0])
    images = p.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    drop_fraction = _check_drop_fraction(drop_fraction, images, p)
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold is {threshold}; accepted: a number in [0, 1]")
    if budget is not None:
        _check_budget(budget, p, cu_seqlens, drop_fraction, capacity, max_seqlen)
    if capacity is not None:
        checks.check_count("capacity", capacity)
        if capacity < images:
            raise ValueError(f"capacity is {capacity}; accepted: at least {images}, one token for each image")
    if max_seqlen is not None:
        checks.check_count("max_seqlen", max_seqlen)
        if max_seqlen < 1:
            raise ValueError(f"max_seqlen is {max_seqlen}; accepted: at least 1, for every image keeps its best token")
    checks.check_no_nan("p", p)
    with without_autocast(p):
        found = backend_for(p).select_tokens(
            p.detach(), cu_seqlens, threshold, drop_fraction, budget, capacity, max_seqlen
        )
    # The reference does not divide the work.
    return found if isinstance(found, PendingSelection) else PendingSelection(found, None)


def _check_drop_fraction(value: float | Tensor, images: int, p: Tensor) -> float | Tensor:
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


def _check_budget(
    budget: int,
    p: Tensor,
    cu_seqlens: Tensor | None,
    drop_fraction: float | Tensor,
    capacity: int | None,
    max_seqlen: int | None,
) -> None:
    checks.check_count("budget", budget)
    if isinstance(drop_fraction, Tensor) or drop_fraction > 0 or capacity is not None or max_seqlen is not None:
        raise ValueError(f"budget={budget} fixes every length; it excludes drop_fraction, capacity and max_seqlen")
    shortest = p.shape[-1]
    if cu_seqlens is not None and cu_seqlens.shape[0] > 1 and checks.value_checks_enabled(p):
        shortest = int((cu_seqlens[1:] - cu_seqlens[:-1]).min())
    if not 1 <= budget <= shortest:
        raise ValueError(f"budget is {budget}; accepted: 1 to {shortest}, the positions of the shortest image")
