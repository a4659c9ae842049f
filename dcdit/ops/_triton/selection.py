"""Token selection on Triton kernels. The host reads one size from the device, unless a budget or capacity fixes it."""

import torch
from torch import Tensor

from dcdit.kernels import selection as kernels
from dcdit.ops._triton.kernel_op import KernelOp
from dcdit.ops.token_selection import PendingSelection, TokenSelection
from dcdit.utils.cuda import PendingRead


def select_tokens(
    p: Tensor,
    cu_seqlens: Tensor | None,
    threshold: float,
    drop_fraction: float | Tensor,
    budget: int | None,
    capacity: int | None,
    max_seqlen: int | None,
    always: Tensor | None,
) -> PendingSelection:
    per_image = drop_fraction.contiguous() if isinstance(drop_fraction, Tensor) else None
    rho = 0.0 if isinstance(drop_fraction, Tensor) else drop_fraction
    sequences = None if cu_seqlens is None else cu_seqlens.contiguous()
    fixed = None if always is None else _bytes(always)
    fields = _select(p.contiguous(), sequences, threshold, rho, per_image, budget, capacity, max_seqlen, fixed, True)
    prob_floor = threshold if budget is None and always is None else 0.0
    return _pending(fields, cu_seqlens, budget, capacity, max_seqlen, prob_floor)


def select_from_mask(
    mask: Tensor, cu_seqlens: Tensor | None, capacity: int | None, max_seqlen: int | None
) -> PendingSelection:
    sequences = None if cu_seqlens is None else cu_seqlens.contiguous()
    fields = _select(_bytes(mask), sequences, 0.5, 0.0, None, None, capacity, max_seqlen, None, False)
    return _pending(fields, cu_seqlens, None, capacity, max_seqlen, 0.0)


def _bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)


def _pending(
    fields: tuple[Tensor, ...],
    cu_seqlens: Tensor | None,
    budget: int | None,
    capacity: int | None,
    max_seqlen: int | None,
    prob_floor: float,
) -> PendingSelection:
    indices, starts, lengths, mask, natural, packed_rows, sizes, overflow = fields
    exact, bound = budget is None and capacity is None, mask.shape[-1]
    if budget is not None:
        bound = budget
    elif capacity is not None and max_seqlen is not None:
        bound = min(max_seqlen, mask.shape[-1])
    selection = TokenSelection(
        indices=indices,
        cu_seqlens=starts,
        lengths=lengths,
        max_seqlen=bound,
        mask=mask,
        natural_mask=natural,
        packed_rows=packed_rows,
        overflow=overflow,
        source_cu_seqlens=cu_seqlens,
        prob_floor=prob_floor,
    )
    # The only read. torch.compile breaks the graph here unless capture_scalar_outputs is on.
    return PendingSelection(selection, PendingRead(sizes) if exact else None)


def _select_fake(
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
) -> tuple[Tensor, ...]:
    images = p.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows = capacity if capacity is not None else p.numel() if budget is None else images * budget
    mask, natural = (p.new_empty(p.shape, dtype=torch.bool) for _ in range(2))
    starts, lengths, packed_rows, sizes, overflow = (
        p.new_empty(shape, dtype=torch.int32) for shape in ((images + 1,), (images,), p.shape, (2,), ())
    )
    return p.new_empty(rows, dtype=torch.int64), starts, lengths, mask, natural, packed_rows, sizes, overflow


_select = KernelOp("select_tokens", kernels.select_fwd, _select_fake)
