"""The last step of both de-chunkers: each position takes one packed row; gate and residual are applied on the way.

The upsampler of H-Net (arXiv 2507.07955, section 2.2, equations 7 to 9).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.ops._torch.custom_op import as_custom_op
from dcdit.ops._torch.packing import take_rows
from dcdit.ops._torch.row_slices import row_slices
from dcdit.ops.autograd import apply, first_derivative_only


def upsample_rows(
    rows: Tensor, row_of: Tensor, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``rows[row_of] + residual``, (S, D) in ``dtype``.

    Args:
        rows: (T, D) packed rows, upcast.
        row_of: (S,) int64, the packed row that each position takes; -1 takes zeros.
        gate: (S,), the ste_coefficient. Its value is not used; its gradient is ``<g, rows[row_of]>``.
        residual: (S, D).
        dtype: of the result.
    """
    return apply(_Upsample, rows, row_of, gate, residual, dtype)


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(
        rows: Tensor, row_of: Tensor, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return _upsample(rows, row_of, residual, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, row_of, gate, residual, _ = inputs
        # Only the gradient of the gate reads the rows.
        ctx.save_for_backward(row_of, None if gate is None else rows)
        ctx.total, ctx.dtype = rows.shape[0], rows.dtype
        ctx.gate_dtype = None if gate is None else gate.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        row_of, rows = ctx.saved_tensors
        grad_rows = grad_gate = grad_residual = None
        if ctx.needs_input_grad[0]:
            grad_rows = _sum_by_row(grad.to(ctx.dtype), row_of, ctx.total)
        if ctx.needs_input_grad[2]:
            grad_gate = _row_dots(grad, rows, row_of).to(ctx.gate_dtype)
        if ctx.needs_input_grad[3]:
            grad_residual = grad.to(ctx.residual_dtype)
        return grad_rows, None, grad_gate, grad_residual, None


def _upsample_fake(rows: Tensor, row_of: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    return rows.new_empty(row_of.shape[0], rows.shape[1], dtype=dtype)


@as_custom_op(_upsample_fake)
def _upsample(rows: Tensor, row_of: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = rows.new_empty(row_of.shape[0], rows.shape[1], dtype=dtype)
    for part in row_slices(out):
        taken = take_rows(rows, row_of[part])
        if residual is None:
            out[part] = taken
        else:
            torch.add(taken, residual[part], out=out[part])
    return out


def _row_dots_fake(grad: Tensor, rows: Tensor, row_of: Tensor) -> Tensor:
    return rows.new_empty(row_of.shape)


@as_custom_op(_row_dots_fake)
def _row_dots(grad: Tensor, rows: Tensor, row_of: Tensor) -> Tensor:
    """(S,): ``<grad_l, rows[row_of_l]>``."""
    out = rows.new_empty(row_of.shape)
    for part in row_slices(grad):
        torch.sum(take_rows(rows, row_of[part]).mul_(grad[part]), -1, out=out[part])
    return out


def _sum_by_row(grad: Tensor, row_of: Tensor, total: int) -> Tensor:
    """(total, D): for each packed row, the sum of ``grad`` over the positions that took it.

    The sum runs in ascending order of position, so it repeats to the bit.
    """
    if grad.shape[0] == 0:
        return grad.new_zeros(total, grad.shape[1])
    # Positions that took no row sort to the end. Their sum is computed and cut off.
    sorted_rows, position = torch.where(row_of < 0, total, row_of).to(torch.int32).sort(stable=True)
    bags = torch.arange(total + 1, dtype=torch.int32, device=grad.device)
    offsets = torch.searchsorted(sorted_rows, bags)
    return F.embedding_bag(position, grad, offsets, mode="sum")[:total]
