"""Zeros in the padding rows of a packed buffer.

Only the device knows how many rows are padding. The grid does not depend on it: a fixed number of programs share the
rows past the last segment among them, and write nothing else.
"""

import triton
import triton.language as tl
from torch import Tensor

from dcdit.kernels import launch
from dcdit.kernels.numerics import cdiv

PROGRAMS = 256
"""About two for each multiprocessor of a large GPU."""

launch.set_default_configs("zero_padding", {"BLOCK": 4096, "num_warps": 4})


@triton.jit(do_not_specialize=["rows", "images"])
def _zero_padding_kernel(
    t_ptr,  # (rows, WIDTH), any dtype
    cu_ptr,  # (images + 1,) int32
    rows, images,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.maximum(tl.load(cu_ptr + images), 0).to(tl.int64) * WIDTH
    end = tl.cast(rows, tl.int64) * WIDTH
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    zeros = tl.zeros((BLOCK,), dtype=t_ptr.dtype.element_ty)  # [BLOCK]
    for first in range(start + tl.program_id(0).to(tl.int64) * BLOCK, end, step):
        index = first + tl.arange(0, BLOCK)  # [BLOCK]
        tl.store(t_ptr + index, zeros, mask=index < end)


def zero_padding(t: Tensor, cu_seqlens: Tensor) -> None:
    """Write zeros to the rows of t (T, ...), contiguous, that lie past ``cu_seqlens[-1]``."""
    rows, numel = t.shape[0], t.numel()
    config = launch.config_for("zero_padding", t.device)
    launch.launch(
        _zero_padding_kernel, (min(PROGRAMS, cdiv(numel, config["BLOCK"])),),
        t, cu_seqlens, rows, cu_seqlens.shape[0] - 1, WIDTH=numel // max(rows, 1), **config,
    )  # fmt: skip
