"""The definitions that every kernel is tested against: plain PyTorch, any device, any float dtype.

Written to be read beside the papers, not to be fast: dense distances, explicit loops over images. float64 inputs are
computed in float64, everything else in float32.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops.numerics import PROB_EPS, ROW_EPS, upcast
from dcdit.ops.token_selection import TokenSelection

# --- boundary probabilities ---------------------------------------------------------------------------------------


def boundary_prob_cosine(q: Tensor, k: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    if cu_seqlens is None:
        if q.shape[1] == 0:
            return upcast(q).sum(-1)
        q_hat, k_hat = F.normalize(upcast(q[:, :-1]), dim=-1), F.normalize(upcast(k[:, 1:]), dim=-1)
        p = ((1 - (q_hat * k_hat).sum(-1)) / 2).clamp(0, 1)
        return F.pad(p, (1, 0), value=1.0)
    sequences = zip(_split(q, cu_seqlens), _split(k, cu_seqlens), strict=True)
    rows = [boundary_prob_cosine(a[None], b[None], None)[0] for a, b in sequences]
    return torch.cat(rows) if rows else upcast(q).sum(-1)


def boundary_prob_cosine2d(q: Tensor, k: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    b, _, d = q.shape
    q_hat, k_hat = F.normalize(upcast(q), dim=-1), F.normalize(upcast(k), dim=-1)
    k_grid = k_hat.transpose(1, 2).reshape(b, d, *grid)
    k_bar = F.conv2d(k_grid, weight.to(k_grid.dtype)[:, None], padding=1, groups=d).flatten(2).transpose(1, 2)
    return ((1 - (q_hat * k_bar).sum(-1)) / 2).clamp(0, 1)


def boundary_prob_predictability(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_groups: int = 8,
    eps: float = 1e-5,
) -> Tensor:
    x = upcast(features)
    x = F.silu(F.group_norm(x, num_groups, norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps))
    logit = torch.einsum("bchw,c->bhw", x, out_weight.to(x.dtype)).flatten(1) + out_bias.to(x.dtype)
    forced = torch.zeros(logit.shape[1], dtype=torch.bool, device=logit.device)
    forced[:1] = forced[-1:] = True
    return torch.where(forced, torch.ones_like(logit), torch.sigmoid(logit))


# --- selection ----------------------------------------------------------------------------------------------------


def select_tokens(
    p: Tensor,
    cu_seqlens: Tensor | None = None,
    threshold: float = 0.5,
    drop_fraction: float | Tensor = 0.0,
    budget: int | None = None,
    capacity: int | None = None,
) -> TokenSelection:
    flat = p.flatten()
    starts = _image_starts(p, cu_seqlens)
    images = len(starts) - 1
    natural = upcast(flat) > threshold
    mask = natural.clone()
    rho = torch.as_tensor(drop_fraction, dtype=torch.float32).expand(images)
    survivors: list[int] = []
    for image in range(images):
        lo, hi = starts[image], starts[image + 1]
        if lo == hi:
            continue
        # Ascending p, ties by ascending raster index: the order in which tokens are dropped.
        order = sorted(range(lo, hi), key=lambda i: (flat[i].item(), i))
        survivors.append(order[-1])
        if budget is not None:
            mask[lo:hi] = False
            mask[order[hi - lo - budget :]] = True
            continue
        kept = [i for i in order if natural[i]]
        n_drop = int(torch.tensor(len(kept), dtype=torch.float32) * rho[image].cpu())
        mask[kept[:n_drop]] = False
        mask[order[-1]] = True
    overflow = 0
    if capacity is not None:
        overflow = max(0, int(mask.sum()) - capacity)
        candidates = [i for i in mask.nonzero().flatten().tolist() if i not in survivors]
        candidates.sort(key=lambda i: (flat[i].item(), i))
        mask[candidates[:overflow]] = False
    lengths = [int(mask[lo:hi].sum()) for lo, hi in pairwise(starts)]
    indices = mask.nonzero().flatten()
    if capacity is not None:
        indices = F.pad(indices, (0, capacity - indices.numel()), value=-1)
    lengths_tensor = torch.tensor(lengths, dtype=torch.int32, device=p.device)
    if budget is not None:
        max_seqlen = budget
    else:
        max_seqlen = p.shape[-1] if capacity is not None else max(lengths, default=0)
    return TokenSelection(
        indices=indices,
        cu_seqlens=F.pad(lengths_tensor.cumsum(0), (1, 0)).to(torch.int32),
        lengths=lengths_tensor,
        max_seqlen=max_seqlen,
        mask=mask.view(p.shape),
        natural_mask=natural.view(p.shape),
        packed_rows=torch.where(mask, mask.cumsum(0) - 1, -1).to(torch.int32).view(p.shape),
        overflow=torch.tensor(overflow, dtype=torch.int32, device=p.device),
        source_cu_seqlens=cu_seqlens,
        prob_floor=0.0 if budget is not None else threshold,
    )


def _image_starts(p: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    if cu_seqlens is not None:
        return cu_seqlens.tolist()
    b, length = p.shape
    return [image * length for image in range(b + 1)]


# --- packing ------------------------------------------------------------------------------------------------------


def gather_tokens(x: Tensor, sel: TokenSelection, bias: Tensor | None = None) -> Tensor:
    kept = sel.indices[sel.indices >= 0]
    tokens = x.reshape(-1, x.shape[-1])[kept]
    if bias is not None:
        tokens = (upcast(tokens) + upcast(bias)[kept % bias.shape[0]]).to(x.dtype)
    return F.pad(tokens, (0, 0, 0, sel.indices.numel() - kept.numel()))


def scatter_tokens(t: Tensor, sel: TokenSelection, fill: float = 0.0) -> Tensor:
    real = sel.indices >= 0
    out = t.new_full((sel.mask.numel(), t.shape[-1]), fill)
    return out.index_put((sel.indices[real],), t[real]).view(*sel.mask.shape, t.shape[-1])


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
    height, width = grid
    rows = torch.arange(height, device=h.device).repeat_interleave(width)
    cols = torch.arange(width, device=h.device).repeat(height)
    confidence = upcast(p).clamp(PROB_EPS, 1 - PROB_EPS)
    images = []
    for image, tokens in enumerate(_split(upcast(h), sel.cu_seqlens)):
        kept = sel.mask[image].nonzero().flatten()
        if kept.numel() == 0:
            images.append(tokens.new_zeros(height * width, tokens.shape[1]))
            continue
        q = confidence[image, kept].to(tokens.dtype)
        apart = (rows[kept, None] - rows[kept]) ** 2 + (cols[kept, None] - cols[kept]) ** 2
        weight = torch.exp(-apart.to(tokens.dtype) / (2 * sigma**2)) * q
        weight = weight / (weight.sum(-1, keepdim=True) + ROW_EPS)
        smoothed = q[:, None] * tokens + (1 - q[:, None]) * (weight @ tokens)
        distance = (rows[:, None] - rows[kept]) ** 2 + (cols[:, None] - cols[kept]) ** 2
        # The key orders by distance, then by raster index, so its minimum settles ties.
        nearest = (distance * (height * width) + kept).argmin(-1)
        images.append(smoothed[nearest])
    grown = torch.stack(images) if images else upcast(h).new_zeros(*p.shape, h.shape[-1])
    return _gate_and_residual(grown, gate, residual, h.dtype)


def dechunk_ema(
    h: Tensor, p: Tensor, sel: TokenSelection, gate: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    confidence = upcast(p).flatten().clamp(PROB_EPS, 1 - PROB_EPS)
    mask = sel.mask.flatten()
    starts = _image_starts(p, sel.source_cu_seqlens)
    held = []
    for tokens, lo, hi in zip(_split(upcast(h), sel.cu_seqlens), starts[:-1], starts[1:], strict=True):
        state = tokens.new_zeros(h.shape[-1])
        position = 0
        for index in range(lo, hi):
            if mask[index]:
                q = confidence[index].to(tokens.dtype)
                state = q * tokens[position] + (1 - q) * state
                position += 1
            held.append(state)
    grown = torch.stack(held) if held else upcast(h).new_zeros(0, h.shape[-1])
    return _gate_and_residual(grown.view(*p.shape, h.shape[-1]), gate, residual, h.dtype)


def _gate_and_residual(grown: Tensor, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    if gate is not None:
        # Straight through: adds an exact zero forward, and <g, grown> to the gate's gradient.
        grown = grown + grown.detach() * (gate - gate.detach())[..., None]
    if residual is not None:
        grown = grown + residual
    return grown.to(dtype)


# --- loss ---------------------------------------------------------------------------------------------------------


def ratio_loss(p: Tensor, natural_mask: Tensor, target: float, group_size: int | None = None) -> Tensor:
    groups = 1 if group_size is None else p.shape[0] // group_size
    kept = natural_mask.reshape(groups, -1).to(upcast(p).dtype).mean(-1)
    mean_p = upcast(p).reshape(groups, -1).mean(-1)
    loss = target / (target - 1) * ((1 - kept) * (1 - mean_p) + (target - 1) * kept * mean_p)
    return loss.mean()


# --- modulation ---------------------------------------------------------------------------------------------------


def modulated_layer_norm(t: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float = 1e-6) -> Tensor:
    normed = [
        F.layer_norm(tokens, tokens.shape[-1:], eps=eps) * (1 + upcast(scale)[i]) + upcast(shift)[i]
        for i, tokens in enumerate(_split(upcast(t), cu_seqlens))
    ]
    return _with_padding(normed, t.new_zeros(t.shape), cu_seqlens)


def gated_add(x: Tensor, y: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Tensor:
    pairs = zip(_split(upcast(x), cu_seqlens), _split(upcast(y), cu_seqlens), strict=True)
    added = [a + upcast(gate)[i] * b for i, (a, b) in enumerate(pairs)]
    return _with_padding(added, x, cu_seqlens)


def gated_add_modulated_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, cu_seqlens: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    added = gated_add(x, y, gate, cu_seqlens)
    return added, modulated_layer_norm(added, shift, scale, cu_seqlens, eps)


def _split(t: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    starts = cu_seqlens.tolist()
    return [t[lo:hi] for lo, hi in pairwise(starts)]


def _with_padding(segments: list[Tensor], padding: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.cat([segment.to(padding.dtype) for segment in segments] + [padding[int(cu_seqlens[-1]) :]])


# --- attention ----------------------------------------------------------------------------------------------------


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool = False, padding: bool = False
) -> Tensor:
    out = []
    for q_i, k_i, v_i in zip(*(_split(upcast(x), cu_seqlens) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q_i, k_i) * q.shape[-1] ** -0.5
        if causal:
            n = scores.shape[-1]
            above = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(above, float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_i))
    return _with_padding(out, q.new_zeros(q.shape), cu_seqlens)
