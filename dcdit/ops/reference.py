"""The definitions that every backend is tested against: plain PyTorch, any device, any float dtype.

They are written to be read beside the papers, not to be fast: dense distances and loops over images. float64 inputs are
computed in float64, everything else in float32.

Letters: B images of L positions on a grid (H, W), or S positions of packed sequences; T kept tokens; D channels.
Papers: DC-DiT is arXiv 2603.06351, H-Net arXiv 2507.07955, DiT arXiv 2212.09748.
"""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor

from dcdit.ops.autograd import matmul
from dcdit.ops.numerics import PROB_EPS, ROW_EPS, shrinking_factor, upcast, upcast_all, widest
from dcdit.ops.token_selection import TokenSelection

# --- boundary probabilities ---------------------------------------------------------------------------------------


def boundary_prob_cosine(q: Tensor, k: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """``p_t = (1 - cos(q_{t-1}, k_t)) / 2``, and p = 1 at the first position of a sequence.

    H-Net, section 2.2, equation 4. The paper writes q_t and k_{t-1}; its code computes what stands here.

    q, k (B, L, D) or (S, D) -> p (B, L) or (S,).
    """
    q, k = upcast_all(q, k)
    if cu_seqlens is not None:
        sequences = zip(_split(q, cu_seqlens), _split(k, cu_seqlens), strict=True)
        parts = [boundary_prob_cosine(q_i[None], k_i[None])[0] for q_i, k_i in sequences]
        return torch.cat([q.new_zeros(0), *parts]) + _zero(q, k)
    length = q.shape[1]
    cosine = reduce(_normalize(q[:, : length - 1]) * _normalize(k[:, 1:]), "b l d -> b l", "sum")
    return F.pad(_dissimilarity(cosine), (min(length, 1), 0), value=1.0)


def boundary_prob_cosine2d(q: Tensor, k: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """``p = (1 - q_hat . kbar) / 2`` with kbar the depthwise 3x3 convolution of k_hat (DC-DiT, router v1).

    q, k (B, L, D), weight (D, 3, 3) -> p (B, L).
    """
    height, width = grid
    q, k, weight = upcast_all(q, k, weight)
    q_hat, k_hat = (_normalize(x).unflatten(1, grid) for x in (q, k))
    padded = F.pad(k_hat, (0, 0, 1, 1, 1, 1))
    k_bar = sum(weight[:, y, x] * padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3))
    return _dissimilarity(reduce(q_hat * k_bar, "b h w d -> b h w", "sum")).flatten(1)


def boundary_prob_predictability(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_groups: int = 8,
    eps: float = 1e-5,
) -> Tensor:
    """``p = sigmoid(out_weight . SiLU(GroupNorm(features)) + out_bias)`` (DC-DiT, router v2, its last layers).

    features (B, C, H, W), norm_weight, norm_bias, out_weight (C,), out_bias () -> p (B, L). p = 1 at both ends.
    """
    x, norm_weight, norm_bias, out_weight, out_bias = upcast_all(features, norm_weight, norm_bias, out_weight, out_bias)
    # Without a position there is nothing to norm, and group_norm has NaN as gradients.
    if x.numel():
        # Contiguous: on a CPU, PyTorch takes the variance of channels-last images from sums of squares.
        x = F.silu(torch.group_norm(x.contiguous(), num_groups, norm_weight, norm_bias, eps))
    logit = matmul(repeat(out_weight, "c -> b 1 c", b=x.shape[0]), x.flatten(2)).squeeze(1) + out_bias
    p = torch.sigmoid(logit) + _zero(norm_weight, norm_bias)
    at_end = torch.zeros(p.shape[1], dtype=torch.bool, device=p.device)
    at_end[:1] = at_end[-1:] = True
    return torch.where(at_end, torch.ones_like(p), p)


def _normalize(x: Tensor) -> Tensor:
    """The rows divided by their norms. A norm below 1e-12 counts as 1e-12."""
    x = x * shrinking_factor(torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True))
    return F.normalize(x, dim=-1)


def _dissimilarity(cosine: Tensor) -> Tensor:
    """``(1 - cosine) / 2`` in [0, 1]; rounding can take a cosine past 1."""
    return ((1 - cosine) / 2).clamp(0, 1)


# --- selection ----------------------------------------------------------------------------------------------------


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
    """Keep p > threshold, then drop the lowest p of each image (DC-DiT, routing and elastic inference).

    ``budget`` keeps the highest p of each image instead. ``max_seqlen`` then drops the lowest p of each image that
    keeps more, and ``capacity`` the lowest p of the batch. The best token of an image always stays. Of equal p, the
    lower index is dropped first. Tokens of ``always`` are kept too; they rank above all others, and the drop fraction
    does not count them. p and always (B, L) or (S,), drop_fraction () or (B,).

    With ``extra_tokens``, as many tokens more come first in each image and are kept; all sizes count them.
    """
    if extra_tokens:
        budget, capacity, max_seqlen = _without_extra_tokens(p.shape[0], extra_tokens, budget, capacity, max_seqlen)
        grid = select_tokens(p, None, threshold, drop_fraction, budget, capacity, max_seqlen, always)
        return _with_extra_tokens(grid, extra_tokens)
    flat = p.flatten()
    fixed = torch.zeros_like(flat, dtype=torch.bool) if always is None else always.flatten()
    starts = _image_starts(p, cu_seqlens).tolist()
    natural = upcast(flat) > threshold
    mask = natural | fixed
    rho = torch.as_tensor(drop_fraction, dtype=torch.float32, device="cpu").expand(len(starts) - 1)
    for image, (lo, hi) in enumerate(pairwise(starts)):
        if lo == hi:
            continue
        drop_order = _drop_order(flat, fixed, range(lo, hi))
        if budget is not None:
            mask[lo:hi] = False
            mask[drop_order[-budget:]] = True
            continue
        chosen = [i for i in drop_order if natural[i] and not fixed[i]]
        n_drop = int(len(chosen) * rho[image])  # a product in float32
        mask[chosen[:n_drop]] = False
        mask[drop_order[-1]] = True
    overflow = _fit(mask, flat, fixed, starts, capacity, max_seqlen)
    prob_floor = 0.0 if budget is not None or always is not None else threshold
    return _pack(
        mask.view(p.shape), natural.view(p.shape), cu_seqlens, overflow, prob_floor, budget, capacity, max_seqlen
    )


def select_from_mask(
    mask: Tensor,
    cu_seqlens: Tensor | None = None,
    capacity: int | None = None,
    max_seqlen: int | None = None,
    extra_tokens: int = 0,
) -> TokenSelection:
    """Keep the mask. What does not fit is dropped as by :func:`select_tokens` where all p are equal.

    mask (B, L) or (S,), bool.
    """
    if extra_tokens:
        _, capacity, max_seqlen = _without_extra_tokens(mask.shape[0], extra_tokens, None, capacity, max_seqlen)
        return _with_extra_tokens(select_from_mask(mask, None, capacity, max_seqlen), extra_tokens)
    kept = mask.flatten().clone()
    overflow = _fit(kept, kept, kept, _image_starts(mask, cu_seqlens).tolist(), capacity, max_seqlen)
    return _pack(kept.view(mask.shape), mask, cu_seqlens, overflow, 0.0, None, capacity, max_seqlen)


def _drop_order(p: Tensor, fixed: Tensor, positions: Iterable[int]) -> list[int]:
    """The positions in the order in which they are dropped: by ascending p, among equals by ascending index, and those
    that are fixed last."""
    rank = list(zip(fixed.tolist(), p.tolist(), strict=True))
    return sorted(positions, key=lambda i: (*rank[i], i))


def _fit(
    mask: Tensor, p: Tensor, fixed: Tensor, starts: list[int], capacity: int | None, max_seqlen: int | None
) -> int:
    """Drop from the mask (S,), in place, until it fits, but never the best of an image; returns how many."""
    before = int(mask.sum())
    drop_order = _drop_order(p, fixed, mask.nonzero().flatten().tolist())
    of_images = [[i for i in drop_order if lo <= i < hi] for lo, hi in pairwise(starts)]
    if max_seqlen is not None:
        mask[[i for kept in of_images for i in kept[:-max_seqlen]]] = False
    if capacity is not None:
        best = {i for kept in of_images for i in kept[-1:]}
        spare = [i for i in drop_order if mask[i] and i not in best]
        mask[spare[: max(0, int(mask.sum()) - capacity)]] = False
    return before - int(mask.sum())


def _pack(
    mask: Tensor,
    natural: Tensor,
    source_cu_seqlens: Tensor | None,
    overflow: int,
    prob_floor: float,
    budget: int | None,
    capacity: int | None,
    max_seqlen: int | None,
) -> TokenSelection:
    """The selection that keeps the mask."""
    lengths = [int(kept.sum()) for kept in _split(mask.flatten(), _image_starts(mask, source_cu_seqlens))]
    indices = mask.flatten().nonzero().flatten()
    bound = max(lengths, default=0)
    if budget is not None:
        bound = budget
    if capacity is not None:
        bound = mask.shape[-1] if max_seqlen is None else min(max_seqlen, mask.shape[-1])
        indices = F.pad(indices, (0, capacity - indices.numel()), value=-1)
    lengths_tensor = torch.tensor(lengths, dtype=torch.int32, device=mask.device)
    return TokenSelection(
        indices=indices,
        cu_seqlens=F.pad(lengths_tensor.cumsum(0), (1, 0)).to(torch.int32),
        lengths=lengths_tensor,
        max_seqlen=bound,
        mask=mask,
        natural_mask=natural,
        packed_rows=torch.where(mask, mask.flatten().cumsum(0).view_as(mask) - 1, -1).to(torch.int32),
        overflow=torch.tensor(overflow, dtype=torch.int32, device=mask.device),
        source_cu_seqlens=source_cu_seqlens,
        prob_floor=prob_floor,
    )


def _without_extra_tokens(
    images: int, extra_tokens: int, budget: int | None, capacity: int | None, max_seqlen: int | None
) -> list[int | None]:
    """What the extra tokens leave of the budget, the capacity and max_seqlen."""
    pairs = ((budget, extra_tokens), (capacity, images * extra_tokens), (max_seqlen, extra_tokens))
    return [None if size is None else size - used for size, used in pairs]


def _with_extra_tokens(grid: TokenSelection, extra_tokens: int) -> TokenSelection:
    """The selection of a grid, and before the tokens of each image the extra ones."""
    mask = F.pad(grid.mask, (extra_tokens, 0), value=True)
    whole = _pack(mask, grid.natural_mask, None, 0, 0.0, None, None, None)
    padding = grid.indices.numel() - int(grid.cu_seqlens[-1])
    return whole._replace(
        indices=F.pad(whole.indices, (0, padding), value=-1),
        max_seqlen=grid.max_seqlen + extra_tokens,
        overflow=grid.overflow,
        prob_floor=grid.prob_floor,
        grid_selection=grid,
    )


def _image_starts(p: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(B+1,): where each image starts in the flattened p, and where the last one ends."""
    return torch.arange(p.shape[0] + 1, device="cpu") * p.shape[1] if cu_seqlens is None else cu_seqlens


# --- packing ------------------------------------------------------------------------------------------------------


def gather_tokens(x: Tensor, sel: TokenSelection, bias: Tensor | None = None) -> Tensor:
    """``t_m = x[indices_m] + bias[indices_m mod L]`` (DC-DiT, routing).

    x (B, L, ...), (1, L, ...) shared by the images, or (S, ...), bias (L, ...), also of fewer channels than x has ->
    t (T, ...), zeros in padding rows.
    """
    kept = sel.indices[sel.indices >= 0]
    rows = x.flatten(0, sel.mask.dim() - 1)
    tokens = rows[kept % max(rows.shape[0], 1)]
    if bias is not None:
        bias = F.pad(upcast(bias), (0, x.shape[-1] - bias.shape[-1]))
        tokens = (upcast(tokens) + bias[kept % bias.shape[0]]).to(x.dtype)
    return torch.cat([tokens, x.new_zeros(sel.indices.numel() - kept.numel(), *tokens.shape[1:])])


def scatter_tokens(t: Tensor, sel: TokenSelection, fill: float = 0.0) -> Tensor:
    """``x[indices_m] = t_m``, ``fill`` elsewhere: the inverse of :func:`gather_tokens`.

    t (T, ...) -> x (B, L, ...) or (S, ...).
    """
    is_token = sel.indices >= 0
    out = t.new_full((sel.mask.numel(), *t.shape[1:]), fill)
    return out.index_put((sel.indices[is_token],), t[is_token]).view(*sel.mask.shape, *t.shape[1:])


# --- de-chunking --------------------------------------------------------------------------------------------------


def dechunk_spatial(
    h: Tensor,
    p: Tensor,
    sel: TokenSelection,
    grid: tuple[int, int],
    sigma: float = 1.0,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Smooth the kept tokens, then each position takes its nearest one (DC-DiT, de-chunking).

    ``h'_i = q_i h_i + (1 - q_i) sum_j W_ij h_j`` with ``W_ij = exp(-|u_i - u_j|^2 / (2 sigma^2)) q_j``, each row of W
    divided by its sum; u is the grid coordinate of a token and q its clamped probability.

    h (T, D), p and gate (B, L), residual (B, L, D) -> (B, L, D). Extra tokens come back first, as they are.
    """
    if sel.grid_selection is not None:
        return _around_extra_tokens(
            lambda h, sel, residual: dechunk_spatial(h, p, sel, grid, sigma, gate, residual), h, sel, residual
        )
    height, width = grid
    dtype = widest(h, residual)
    h = upcast(h.to(dtype))
    row = repeat(torch.arange(height, device=h.device), "h -> (h w)", w=width)
    column = repeat(torch.arange(width, device=h.device), "w -> (h w)", h=height)
    images = []
    for tokens, mask, q in zip(_split(h, sel.cu_seqlens), sel.mask, _clamped_prob(p, h), strict=True):
        (kept,) = mask.nonzero(as_tuple=True)
        if kept.numel() == 0:
            images.append(tokens.new_zeros(height * width, tokens.shape[1]))
            continue
        # |u_l - u_j|^2 of every position l and every kept token j.
        distance = (row[:, None] - row[kept]) ** 2 + (column[:, None] - column[kept]) ** 2
        q = q[kept]
        weight = torch.exp(-distance[kept].to(tokens.dtype) / (2 * sigma**2)) * q
        weight = weight / (reduce(weight, "i j -> i 1", "sum") + ROW_EPS)
        q = rearrange(q, "i -> i 1")
        smoothed = q * tokens + (1 - q) * matmul(weight[None], tokens[None])[0]
        # The key orders by distance, then by raster index, so its minimum settles ties.
        nearest = (distance * (height * width) + kept).argmin(-1)
        images.append(smoothed[nearest])
    dechunked = torch.cat([h.new_zeros(0, h.shape[-1]), *images]).view(*p.shape, h.shape[-1]) + _zero(h, p)
    return _gate_and_residual(dechunked, gate, residual, dtype)


def dechunk_ema(
    h: Tensor, p: Tensor, sel: TokenSelection, gate: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """``hbar_m = q_m h_m + (1 - q_m) hbar_{m-1}``, then each position takes the last hbar so far, 0 before the first.

    H-Net, section 2.2, equations 5 (the average) and 8 (the last one so far).

    h (T, D), p and gate (B, L) or (S,), residual (B, L, D) or (S, D) -> the shape of residual. Extra tokens come back
    first, as they are.
    """
    if sel.grid_selection is not None:
        return _around_extra_tokens(lambda h, sel, residual: dechunk_ema(h, p, sel, gate, residual), h, sel, residual)
    dtype = widest(h, residual)
    h = upcast(h.to(dtype))
    source_starts = _image_starts(p, sel.source_cu_seqlens)
    sequences = zip(
        _split(h, sel.cu_seqlens),
        _split(sel.mask.flatten(), source_starts),
        _split(_clamped_prob(p, h).flatten(), source_starts),
        strict=True,
    )
    states = []
    for tokens, mask, q in sequences:
        state = tokens.new_zeros(h.shape[-1])
        kept_tokens = zip(tokens, q[mask], strict=True)
        for is_kept in mask.tolist():
            if is_kept:
                h_m, q_m = next(kept_tokens)
                state = q_m * h_m + (1 - q_m) * state
            states.append(state)
    dechunked = torch.stack(states) if states else h.new_zeros(0, h.shape[-1])
    return _gate_and_residual(dechunked.view(*p.shape, h.shape[-1]) + _zero(h, p), gate, residual, dtype)


def _around_extra_tokens(
    dechunk: Callable[[Tensor, TokenSelection, Tensor | None], Tensor],
    h: Tensor,
    sel: TokenSelection,
    residual: Tensor | None,
) -> Tensor:
    """The extra tokens of each image, and behind them its de-chunked grid: (B, n + L, D)."""
    extra, grid, images = sel.extra_tokens, sel.grid_selection, _split(h, sel.cu_seqlens)
    assert grid is not None
    outside = torch.cat([h[:0], *(tokens[:extra] for tokens in images)]).view(len(images), extra, h.shape[1])
    tokens = _join([tokens[extra:] for tokens in images], h, sel.cu_seqlens)
    if residual is None:
        return torch.cat([outside, dechunk(tokens, grid, None)], 1)
    added = (outside + residual[:, :extra]).to(widest(h, residual))
    return torch.cat([added, dechunk(tokens, grid, residual[:, extra:])], 1)


def _clamped_prob(p: Tensor, h: Tensor) -> Tensor:
    """``q = clamp(p, 1e-4, 1 - 1e-4)`` in the dtype of the upcast h; shape of p."""
    return upcast(p).clamp(PROB_EPS, 1 - PROB_EPS).to(h.dtype)


def _gate_and_residual(dechunked: Tensor, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``ste(c) * dechunked + residual`` (H-Net, section 2.2, equations 7 and 9); c is ``gate``.

    The straight-through estimator ``ste(c)`` has the value 1 and passes its gradient on to c, which thus gets
    ``<g, dechunked>``. dechunked, residual (..., D), gate (...) -> (..., D).
    """
    if gate is not None:
        c = rearrange(gate, "... -> ... 1")
        dechunked = dechunked + dechunked.detach() * (c - c.detach())
    if residual is not None:
        dechunked = dechunked + residual
    return dechunked.to(dtype)


# --- loss ---------------------------------------------------------------------------------------------------------


def ratio_loss(p: Tensor, natural_mask: Tensor, target: float, group_size: int | None = None) -> Tensor:
    """``N/(N-1) * ((1-F)(1-G) + (N-1) F G)``, the mean over groups of images (H-Net, section 2.3, equation 10).

    F is the mean of natural_mask and G the mean of p in a group. p, natural_mask (B, L) or (S,) -> ().
    """
    p = upcast(p)
    groups = 1 if group_size is None else p.shape[0] // group_size
    kept_fraction = reduce(natural_mask.to(p.dtype), "(group n) ... -> group", "mean", group=groups)
    mean_p = reduce(p, "(group n) ... -> group", "mean", group=groups)
    loss = (1 - kept_fraction) * (1 - mean_p) + (target - 1) * kept_fraction * mean_p
    return (target / (target - 1) * loss).mean()


# --- modulation ---------------------------------------------------------------------------------------------------


def modulated_layer_norm(
    t: Tensor,
    shift: Tensor,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``(LayerNorm(t) * weight + bias) * (1 + scale[image]) + shift[image]`` (DiT, section 3.2, adaLN).

    t (T, D), shift and scale (B, D), weight and bias (D,) -> (T, D), zeros in padding rows.
    """
    padding = t.new_zeros(t.shape)
    given = [x for x in (t, shift, scale, weight, bias) if x is not None]
    t, shift, scale, *affine = upcast_all(*given)
    weight = affine[0] if weight is not None else None
    bias = affine[-1] if bias is not None else None
    images = zip(_split(t, cu_seqlens), shift, scale, strict=True)
    normed = [
        F.layer_norm(t_i, t_i.shape[-1:], weight, bias, eps) * (1 + scale_i) + shift_i
        for t_i, shift_i, scale_i in images
    ]
    return _join(normed, padding, cu_seqlens) + _zero(t, shift, scale, *affine)


def modulated_rms_norm(
    t: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    cu_seqlens: Tensor,
    eps: float = 1e-6,
    weight: Tensor | None = None,
) -> Tensor:
    """``t / sqrt(mean(t^2) + eps) * weight * (1 + scale[image]) + shift[image]`` (arXiv 1910.07467, equation 4).

    t (T, D), shift and scale (B, D), weight (D,) -> (T, D), zeros in padding rows.
    """
    padding = t.new_zeros(t.shape)
    shift = torch.zeros_like(scale) if shift is None else shift
    weight = torch.ones_like(scale[:0].sum(0)) if weight is None else weight
    t, shift, scale, weight = upcast_all(t, shift, scale, weight)
    normed = []
    for t_i, shift_i, scale_i in zip(_split(t, cu_seqlens), shift, scale, strict=True):
        mean_square = reduce(t_i.square(), "m d -> m 1", "mean")
        normed.append(t_i / (mean_square + eps).sqrt() * weight * (1 + scale_i) + shift_i)
    return _join(normed, padding, cu_seqlens) + _zero(t, shift, scale, weight)


def gated_add(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``x + gate[image] * y`` (DiT, section 3.2, adaLN-Zero).

    x, y (T, D), gate (B, D) -> (T, D), x in padding rows.
    """
    padding = x.to(widest(x, y))
    x, y, gate = upcast_all(x, y, gate)
    images = zip(_split(x, cu_seqlens), _split(y, cu_seqlens), gate, strict=True)
    return _join([x_i + gate_i * y_i for x_i, y_i, gate_i in images], padding, cu_seqlens) + _zero(y, gate)


def gated_add_modulated_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """:func:`gated_add`, and :func:`modulated_layer_norm` of its result as it is stored (DiT, section 3.2).

    x, y (T, D), gate, shift, scale (B, D) -> two tensors (T, D).
    """
    added = gated_add(x, y, gate, cu_seqlens)
    return added, modulated_layer_norm(added, shift, scale, cu_seqlens, eps)


# --- group norm ---------------------------------------------------------------------------------------------------


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``SiLU(GroupNorm(x + shift))`` (DC-DiT, encoder and decoder; Group Normalization, arXiv 1803.08494, equation 1).

    x (B, L, C) or (B, C, H, W), weight and bias (C,), shift (B, C) -> the shape of x.
    """
    if x.dim() == 4:
        tokens = group_norm_silu(rearrange(x, "b c h w -> b (h w) c"), num_groups, weight, bias, shift, eps)
        return rearrange(tokens, "b (h w) c -> b c h w", h=x.shape[2], w=x.shape[3])
    dtype = x.dtype
    x, weight, bias, shift = upcast_all(x, weight, bias, x.new_zeros(()) if shift is None else shift[:, None])
    return F.silu(_group_norm(x + shift, num_groups, weight, bias, eps)).to(dtype)


def _group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (B, L, C), mean and variance over the positions and the channels of a group of one image."""
    groups = rearrange(x, "b l (group c) -> b group (l c)", group=num_groups)
    centred = groups - groups.mean(2, keepdim=True)
    x_hat = centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()
    return rearrange(x_hat, "b group (l c) -> b l (group c)", c=x.shape[2] // num_groups) * weight + bias


# --- attention ----------------------------------------------------------------------------------------------------


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool = False,
    padding: bool = False,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` inside each sequence (Attention Is All You Need, arXiv 1706.03762, equation 1).

    q (T, heads, d), k and v (T, heads, d), or (T_k, fewer heads, d) with sequences of their own -> (T, heads, d). Zeros
    in padding rows, and for a q that sees no k. max_seqlen and padding change nothing here.
    """
    starts_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    out, zeros = [], q.new_zeros(q.shape, dtype=widest(q, k, v))
    q, k, v = upcast_all(q, k, v)
    for q_i, k_i, v_i in zip(_split(q, cu_seqlens), _split(k, starts_k), _split(v, starts_k), strict=True):
        k_i, v_i = (repeat(x, "token head d -> (head n) token d", n=q.shape[1] // k.shape[1]) for x in (k_i, v_i))
        # The last q sees all of k. Where there are more q than k, the first see none.
        blind = max(0, q_i.shape[0] - k_i.shape[1]) if causal or k_i.shape[1] == 0 else 0
        scores = matmul(rearrange(q_i[blind:], "token head d -> head token d"), k_i.mT) * q.shape[-1] ** -0.5
        if causal:
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
            scores = scores.masked_fill(later.triu(1 + scores.shape[2] - scores.shape[1]), float("-inf"))
        seen = rearrange(matmul(scores.softmax(-1), v_i), "head token d -> token head d")
        out.append(F.pad(seen, (0, 0, 0, 0, blind, 0)))
    return _join(out, zeros, cu_seqlens) + _zero(q, k, v)


# --- noise --------------------------------------------------------------------------------------------------------


def philox_normal(seed: Tensor, images: Tensor, step: Tensor, size: int) -> Tensor:
    """Words (a, b, c, d) of Philox4x32-10 for the key seed and the counter (place // 4, step, image) -> four normals.

    The transform of Box and Muller: ``sqrt(-2 ln u) * (cos v, sin v)`` with ``u = a / 2^32 + 1 / 2^33``, rounded to
    float32 after the division and after the sum, and ``v = 2 pi b / 2^32``; the same of c and d. Computed in float64.

    seed () int64, images (B,) int64, step () int64 -> (B, size) float32.
    """
    rows = []
    for image in images.tolist():
        normals: list[float] = []
        for block in range(-(-size // 4)):
            counter = (block, int(step), image, image >> 32)
            a, b, c, d = _philox4x32(counter, (int(seed), int(seed) >> 32))
            for word, other in ((a, b), (c, d)):
                u = float(torch.tensor(word, device="cpu").float() * 2.0**-32 + 2.0**-33)
                radius, angle = math.sqrt(-2 * math.log(u)), 2 * math.pi * other / 2**32
                normals += [radius * math.cos(angle), radius * math.sin(angle)]
        rows.append(normals[:size])
    return torch.tensor(rows, dtype=torch.float32, device=images.device).reshape(len(rows), size)


def _philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox4x32 (Salmon et al. 2011, section 3.3); of each word the low 32 bits count."""
    a, b, c, d = (word % 2**32 for word in counter)
    for number in range(10):
        left, right = key[0] + number * 0x9E3779B9, key[1] + number * 0xBB67AE85
        from_a, from_c = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (
            (from_c >> 32) ^ b ^ left % 2**32,
            from_c % 2**32,
            (from_a >> 32) ^ d ^ right % 2**32,
            from_a % 2**32,
        )
    return a, b, c, d


# --- segments -----------------------------------------------------------------------------------------------------


def _split(t: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """The rows of each segment, without padding rows."""
    return [t[lo:hi] for lo, hi in pairwise(cu_seqlens.tolist())]


def _zero(*tensors: Tensor) -> Tensor:
    """() 0, as a function of the tensors: an argument of which nothing is read has a gradient all the same, zeros."""
    return torch.stack([x[:0].sum() for x in tensors]).sum()


def _join(segments: list[Tensor], padding: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The segments one after another in the dtype of ``padding``, then its padding rows."""
    return torch.cat([segment.to(padding.dtype) for segment in segments] + [padding[int(cu_seqlens[-1]) :]])
