"""Last step of both de-chunkers: every position takes one packed row, then straight-through gate and residual."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops._torch.packing import take_rows
from dcdit.ops._torch.rows import as_custom_op, chunks
from dcdit.ops.autograd import first_derivative_only


def spread_rows(
    rows: Tensor, owner: Tensor, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``rows[owner] + residual`` in ``dtype``.

    rows (T, D), wide; owner (S,) int64, -1 takes zeros; gate (S,), value unused, gradient ``<g, rows[owner]>``;
    residual (S, D) or None.
    """
    return _Spread.apply(rows, owner, gate, residual, dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, owner: Tensor, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        # The rows themselves matter to the gate only.
        ctx.save_for_backward(owner, None if gate is None else rows)
        ctx.total, ctx.dtype = rows.shape[0], rows.dtype
        ctx.gate_dtype = None if gate is None else gate.dtype
        return _spread(rows, owner, residual, dtype)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        owner, rows = ctx.saved_tensors
        grad_rows = grad_gate = None
        if ctx.needs_input_grad[0]:
            grad_rows = sum_by_owner(grad.to(ctx.dtype), owner, ctx.total)
        if ctx.needs_input_grad[2]:
            grad_gate = _row_dots(grad, rows, owner).to(ctx.gate_dtype)
        return grad_rows, None, grad_gate, grad if ctx.needs_input_grad[3] else None, None


def _spread_fake(rows: Tensor, owner: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    return rows.new_empty(owner.shape[0], rows.shape[1], dtype=dtype)


@as_custom_op(_spread_fake)
def _spread(rows: Tensor, owner: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = rows.new_empty(owner.shape[0], rows.shape[1], dtype=dtype)
    for part in chunks(out):
        taken = take_rows(rows, owner[part])
        if residual is None:
            out[part] = taken
        else:
            torch.add(taken, residual[part], out=out[part])
    return out


def _row_dots_fake(grad: Tensor, rows: Tensor, owner: Tensor) -> Tensor:
    return rows.new_empty(owner.shape)


@as_custom_op(_row_dots_fake)
def _row_dots(grad: Tensor, rows: Tensor, owner: Tensor) -> Tensor:
    """``<grad_l, rows[owner_l]>``."""
    out = rows.new_empty(owner.shape)
    for part in chunks(grad):
        torch.sum(take_rows(rows, owner[part]).mul_(grad[part]), -1, out=out[part])
    return out


def sum_by_owner(grad: Tensor, owner: Tensor, total: int) -> Tensor:
    """(total, D): sum of the rows of each owner, in ascending order of position, so always the same."""
    if total == 0 or grad.shape[0] == 0:
        return grad.new_zeros(total, grad.shape[1])
    # Rows without an owner sort to the end, into a bag of their own.
    sorted_owner, position = torch.where(owner < 0, total, owner).to(torch.int32).sort(stable=True)
    bags = torch.arange(total + 1, dtype=torch.int32, device=grad.device)
    offsets = torch.searchsorted(sorted_owner, bags)
    return F.embedding_bag(position, grad, offsets, mode="sum")[:total]
