"""Gather tokens into the packed buffer and scatter them back: one read and one write per element."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import cdiv

launch.set_default_configs(
    "gather",
    D={
        32: {"ROWS": 32, "BLOCK_D": 32, "num_warps": 4},
        1024: {"ROWS": 16, "BLOCK_D": 128, "num_warps": 4},
    },
)
launch.set_default_configs(
    "scatter",
    D={
        32: {"ROWS": 32, "BLOCK_D": 32, "num_warps": 4},
        1024: {"ROWS": 16, "BLOCK_D": 128, "num_warps": 4},
    },
)


@triton.jit
def _tile(D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows and columns of a program: the programs of one group of rows follow each other."""
    per_row: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    row = (pid // per_row).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, (pid % per_row) * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit(do_not_specialize=["rows", "length"])
def _gather_kernel(
    x_ptr, index_ptr, bias_ptr, out_ptr, rows, length, x_stride,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, col = _tile(D, ROWS, BLOCK_D)  # [ROWS], [BLOCK_D]
    source = tl.load(index_ptr + row, mask=row < rows, other=-1)
    inside = (row < rows)[:, None] & (col < D)[None, :]
    real = inside & (source >= 0)[:, None]
    tile = tl.load(x_ptr + source[:, None] * x_stride + col[None, :], mask=real, other=0.0)
    if HAS_BIAS:
        bias_row = (source % length)[:, None] * D
        bias = tl.load(bias_ptr + bias_row + col[None, :], mask=real, other=0.0)
        tile = (tile.to(tl.float32) + bias.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * D + col[None, :], tile, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _scatter_kernel(
    t_ptr, slot_ptr, out_ptr, rows, t_stride, fill,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, col = _tile(D, ROWS, BLOCK_D)  # [ROWS], [BLOCK_D]
    slot = tl.load(slot_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    inside = (row < rows)[:, None] & (col < D)[None, :]
    kept = inside & (slot >= 0)[:, None]
    tile = tl.load(t_ptr + slot[:, None] * t_stride + col[None, :], mask=kept, other=fill)
    tl.store(out_ptr + row[:, None] * D + col[None, :], tile, mask=inside)


@triton.jit(do_not_specialize=["images", "length"])
def _bias_sum_kernel(
    grad_ptr, slot_ptr, out_ptr, images, length,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, col = _tile(D, ROWS, BLOCK_D)  # [ROWS], [BLOCK_D]
    inside = (row < length)[:, None] & (col < D)[None, :]
    total = tl.zeros((ROWS, BLOCK_D), dtype=tl.float32)
    position = row
    for _ in range(images):
        slot = tl.load(slot_ptr + position, mask=row < length, other=-1).to(tl.int64)
        kept = inside & (slot >= 0)[:, None]
        total += tl.load(grad_ptr + slot[:, None] * D + col[None, :], mask=kept, other=0.0).to(tl.float32)
        position += length
    tl.store(out_ptr + row[:, None] * D + col[None, :], total, mask=inside)


def _grid(rows: int, d: int, config: dict[str, int]) -> tuple[int]:
    return (cdiv(rows, config["ROWS"]) * cdiv(d, config["BLOCK_D"]),)


def gather_fwd(x: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    """(S, D) rows with a unit last stride, (T,) int64 indices (-1 is padding), contiguous (L, D) bias -> (T, D)."""
    rows, d = indices.shape[0], x.shape[1]
    out = launch.empty((rows, d), x.dtype, x.device)
    config = launch.config_for("gather", x.device, D=d)
    grid = _grid(rows, d, config)
    length = 1 if bias is None else bias.shape[0]
    launch.launch(
        _gather_kernel, grid, x, indices, x if bias is None else bias, out, rows, length, x.stride(0),
        D=d, HAS_BIAS=bias is not None, **config,
    )  # fmt: skip
    return out


def scatter_fwd(t: Tensor, packed_rows: Tensor, fill: float) -> Tensor:
    """(T, D) rows with a unit last stride, int32 packed_rows of S positions (-1 is not kept) -> (S, D)."""
    rows, d = packed_rows.numel(), t.shape[1]
    out = launch.empty((rows, d), t.dtype, t.device)
    config = launch.config_for("scatter", t.device, D=d)
    grid = _grid(rows, d, config)
    launch.launch(_scatter_kernel, grid, t, packed_rows, out, rows, t.stride(0), fill, D=d, **config)
    return out


def bias_bwd(grad: Tensor, packed_rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous (T, D) gradient of the packed tokens, (B, L) int32 packed_rows -> (L, D): sum over the images."""
    (images, length), d = packed_rows.shape, grad.shape[1]
    out = launch.empty((length, d), dtype, grad.device)
    config = launch.config_for("gather", grad.device, D=d)
    grid = _grid(length, d, config)
    launch.launch(_bias_sum_kernel, grid, grad, packed_rows, out, images, length, D=d, **config)
    return out
