"""Gather tokens into the packed buffer and scatter them back.

    gather:   out[t] = x[index[t]] + bias[index[t] mod L],  0 where index[t] = -1; of a shared x, x[index[t] mod L]
    scatter:  out[s] = t[packed_row[s]],  the fill value where packed_row[s] = -1

Each is one pass, with one read and one write per element, and each is the backward of the other. The gradient of the
bias is one more pass: a sum over the images in their order. A warp moves whole rows (see ``rows``), so that it reads an
index once for each, and no row is cut into pieces of different programs.

In the comments at pointers, "float" is float32, bfloat16 or float16, and "any" an integer too. Without a named stride,
rows are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import cdiv
from dcdit.kernels.rows import load_part, parts_of, rows_from, store_part

launch.set_default_configs(
    "gather",
    D={
        32: {"ROWS": 32, "num_warps": 4},
        256: {"ROWS": 1, "num_warps": 1},
    },
)


@triton.jit
def _gather_part(x_ptr, bias_ptr, out_ptr, exists, kept, FIRST: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    tile = load_part(x_ptr, kept, FIRST, N, D)  # [ROWS, N]
    if bias_ptr is not None:
        bias = load_part(bias_ptr, kept, FIRST, N, D)
        tile = (tile.to(tl.float32) + bias.to(tl.float32)).to(out_ptr.dtype.element_ty)
    store_part(out_ptr, tile, exists, FIRST, N, D)


@triton.jit(do_not_specialize=["rows", "length"])
def _gather_kernel(
    x_ptr,  # (S, D) any, (length, D) if SHARED, row stride x_stride
    index_ptr,  # (rows,) int64: row of x, -1 in padding rows
    bias_ptr,  # (length, D) float or None
    out_ptr,  # (rows, D) in x's dtype
    rows, length, x_stride,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, exists = rows_from(tl.program_id(0).to(tl.int64) * ROWS, rows, ROWS)
    index = tl.load(index_ptr + row, mask=row < rows, other=-1)
    kept = exists & (index >= 0)
    x = x_ptr + (index % length if SHARED else index) * x_stride
    out = out_ptr + row * D
    bias = None if bias_ptr is None else bias_ptr + (index % length) * D
    _gather_part(x, bias, out, exists, kept, 0, MAIN, D)
    if TAIL > 0:
        _gather_part(x, bias, out, exists, kept, MAIN, TAIL, D)


launch.set_default_configs(
    "scatter",
    D={
        32: {"ROWS": 32, "num_warps": 4},
        256: {"ROWS": 1, "num_warps": 1},
    },
)


@triton.jit(do_not_specialize=["rows"])
def _scatter_kernel(
    t_ptr,  # (T, D) any, row stride t_stride
    packed_row_ptr,  # (rows,) int32: row of t, -1 where the position is not kept
    out_ptr,  # (rows, D) in t's dtype
    rows, t_stride, fill,
    D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, exists = rows_from(tl.program_id(0).to(tl.int64) * ROWS, rows, ROWS)
    packed_row = tl.load(packed_row_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    kept = exists & (packed_row >= 0)
    t = t_ptr + packed_row * t_stride
    out = out_ptr + row * D
    store_part(out, load_part(t, kept, 0, MAIN, D, fill), exists, 0, MAIN, D)
    if TAIL > 0:
        store_part(out, load_part(t, kept, MAIN, TAIL, D, fill), exists, MAIN, TAIL, D)


launch.set_default_configs(
    "gather_bias_bwd",
    D={
        32: {"ROWS": 32, "BLOCK_D": 32, "num_warps": 4, "maxnreg": 128},
        1024: {"ROWS": 16, "BLOCK_D": 128, "num_warps": 4, "maxnreg": 128},
    },
)


@triton.jit(do_not_specialize=["images", "length"])
def _bias_bwd_kernel(
    grad_ptr,  # (T, D) float
    packed_row_ptr,  # (images, length) int32: row of grad, -1 where the position is not kept
    out_ptr,  # (length, D) float
    images, length,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks_per_row: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    col = (tl.program_id(0) % blocks_per_row) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inside = (row < length)[:, None] & (col < D)[None, :]  # [ROWS, BLOCK_D]
    total = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    position = row
    for _ in range(images):
        packed_row = tl.load(packed_row_ptr + position, mask=row < length, other=-1).to(tl.int64)  # [ROWS]
        kept = inside & (packed_row >= 0)[:, None]
        total += tl.load(grad_ptr + packed_row[:, None] * D + col[None, :], mask=kept, other=0.0).to(tl.float32)
        position += length
    tl.store(out_ptr + row[:, None] * D + col[None, :], total, mask=inside)


def gather_fwd(x: Tensor, indices: Tensor, bias: Tensor | None, shared: bool = False) -> Tensor:
    """(S, D) rows with a unit last stride, (T,) int64 indices (-1 is padding), contiguous (L, D) bias -> (T, D).

    The rows of a shared x are (L, D).
    """
    rows, d = indices.shape[0], x.shape[1]
    out = launch.empty((rows, d), x.dtype, x.device)
    config = launch.config_for("gather", x.device, D=d)
    table = x if shared else bias
    length = 1 if table is None else max(table.shape[0], 1)  # a divisor
    launch.launch(
        _gather_kernel, (cdiv(rows, config["ROWS"]),), x, indices, bias, out, rows, length, x.stride(0),
        D=d, **parts_of(d), SHARED=shared, **config,
    )  # fmt: skip
    return out


def scatter_fwd(t: Tensor, packed_rows: Tensor, fill: float) -> Tensor:
    """(T, D) rows with a unit last stride, any dtype, int32 packed_rows of S positions (-1 is not kept) -> (S, D)."""
    rows, d = packed_rows.numel(), t.shape[1]
    out = launch.empty((rows, d), t.dtype, t.device)
    config = launch.config_for("scatter", t.device, D=d)
    if not t.is_floating_point():
        fill = int(fill)
    launch.launch(
        _scatter_kernel, (cdiv(rows, config["ROWS"]),), t, packed_rows, out, rows, t.stride(0), fill,
        D=d, **parts_of(d), **config,
    )  # fmt: skip
    return out


def bias_bwd(grad: Tensor, packed_rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous (T, D) gradient of the packed tokens, (B, L) int32 packed_rows -> (L, D): sum over the images."""
    (images, length), d = packed_rows.shape, grad.shape[1]
    out = launch.empty((length, d), dtype, grad.device)
    config = launch.config_for("gather_bias_bwd", grad.device, D=d)
    grid = (cdiv(length, config["ROWS"]) * cdiv(d, config["BLOCK_D"]),)
    launch.launch(_bias_bwd_kernel, grid, grad, packed_rows, out, images, length, D=d, **config)
    return out
