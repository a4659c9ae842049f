"""Rows of D columns in registers without idle lanes: a part of MAIN columns and a tail of TAIL, both powers of two.

A tile has a power of two of columns. One tile for a row of 1152 would have 2048, and 44 % of its lanes would do
nothing; 1024 + 128 fit. Every width of a DiT and a quarter of it is the sum of two powers of two. For other widths the
tail is rounded up; it is 0 where D is a power of two, and Triton compiles the code for it away.

The parts below take a pointer to the first column of each row. A kernel makes it in line, and makes None of a pointer
that is None: a function cannot, because Triton 3.6 compiles none that returns None.
"""

import triton
import triton.language as tl

from dcdit.kernels.numerics import next_power_of_2


def parts_of(d: int) -> dict[str, int]:
    """``MAIN``, the largest power of two up to D, and ``TAIL``, that from what is left on."""
    main = next_power_of_2(d + 1) // 2
    return {"MAIN": main, "TAIL": next_power_of_2(d - main) if d > main else 0}


@triton.jit
def rows_from(first, end, ROWS: tl.constexpr):
    """The rows first to first + ROWS [ROWS, 1], and which of them are before ``end``. One row is a scalar that exists.

    A number for each row has the layout of the tile that it comes from, and Triton would rather move a tile than such
    numbers from one layout to another. A scalar has none.
    """
    if ROWS == 1:
        return first, tl.full((1, 1), 1, tl.int1)
    else:  # Without the else, Triton would compile both returns.
        row = (first + tl.arange(0, ROWS))[:, None]
        return row, row < end


@triton.jit
def sum_columns(x):
    """Of each row: [ROWS, N] -> [ROWS, 1], or a scalar for one row."""
    if x.shape[0] == 1:
        return tl.sum(tl.sum(x, 1), 0)
    else:
        return tl.sum(x, 1)[:, None]


@triton.jit
def _inside(exists, FIRST: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    if FIRST + N > D:
        return exists & (FIRST + tl.arange(0, N) < D)[None, :]
    else:
        return exists


@triton.jit
def load_part(
    ptr,  # [ROWS, 1] or a scalar, at the first column of each row
    exists,  # [ROWS, 1] bool; elsewhere nothing is read and ``other`` is returned
    FIRST: tl.constexpr, N: tl.constexpr, D: tl.constexpr, other=0.0,
):  # fmt: skip
    """The columns FIRST to FIRST + N of rows: [ROWS, N], ``other`` past column D."""
    return tl.load(ptr + (FIRST + tl.arange(0, N))[None, :], mask=_inside(exists, FIRST, N, D), other=other)


@triton.jit
def store_part(
    ptr,  # [ROWS, 1] or a scalar, at the first column of each row
    value,  # [ROWS, N]
    exists,  # [ROWS, 1] bool; elsewhere nothing is written
    FIRST: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write the columns FIRST to FIRST + N of rows, but none past column D."""
    tl.store(ptr + (FIRST + tl.arange(0, N))[None, :], value, mask=_inside(exists, FIRST, N, D))


@triton.jit
def load_table_part(ptr, FIRST: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """The columns FIRST to FIRST + N of one row that all rows of a tile share: float32 [1, N], 0 past column D."""
    col = (FIRST + tl.arange(0, N))[None, :]  # [1, N]
    if FIRST + N > D:
        return tl.load(ptr + col, mask=col < D, other=0.0).to(tl.float32)
    else:
        return tl.load(ptr + col).to(tl.float32)
