"""Gather and scatter: rows expanded to (B, M, D) index tensors, M the longest kept length, as padded code does it.

Which rows are kept is looked up beforehand: a mask as an index would make the host wait for a GPU in every call.
"""

import torch
from einops import repeat
from torch import Tensor

from dcdit import ops
from dcdit.ops import TokenSelection
from dcdit.profiling.workloads.core import Arguments, Call, Case, Inputs, Operation


def padded_positions(sel: TokenSelection) -> tuple[Tensor, Tensor]:
    """Kept positions of each image in raster order, padded to the longest (B, M), and which of them are real."""
    length, longest = sel.mask.shape[1], int(sel.lengths.max())
    position = torch.arange(length, device=sel.mask.device)
    order = torch.where(sel.mask, position, length + position).argsort(dim=1)[:, :longest]
    return order, torch.arange(longest, device=order.device) < sel.lengths[:, None]


def real_rows(real: Tensor) -> Tensor:
    """The numbers of the rows of (B * M, D) that are real, of what :func:`padded_positions` returns."""
    return real.flatten().nonzero().squeeze(1)


def _gather(inputs: Inputs) -> Arguments:
    x, sel = inputs.tokens(), inputs.selection()
    return {"x": x, "sel": sel, "bias": inputs.normal(inputs.shape.length, inputs.shape.width, dtype=torch.float32)}


def _shared_gather(inputs: Inputs) -> Arguments:
    """A table of two heads that all images share, and a bias of half as many channels."""
    length, width, sel = inputs.shape.length, inputs.shape.width, inputs.padded_selection()
    bias = inputs.normal(length, 2, (width + 1) // 2, dtype=torch.float32)
    return {"x": inputs.normal(1, length, 2, width), "sel": sel, "bias": bias}


def _packed_gather(inputs: Inputs) -> Arguments:
    return {"x": inputs.source_rows(), "sel": inputs.packed_selection()}


def _plain_gather(x: Tensor, sel: TokenSelection, bias: Tensor) -> Call:
    order, real = padded_positions(sel)
    rows = real_rows(real)

    def call() -> Tensor:
        index = repeat(order, "b m -> b m d", d=x.shape[2])
        tokens = x.gather(1, index).flatten(0, 1)[rows]
        added = repeat(bias, "l d -> b l d", b=x.shape[0]).gather(1, index).flatten(0, 1)[rows]
        return (tokens.float() + added).to(x.dtype)

    return call


def _scatter(inputs: Inputs) -> Arguments:
    sel = inputs.selection()
    return {"t": inputs.packed(sel), "sel": sel}


def _padded_scatter(inputs: Inputs) -> Arguments:
    sel = inputs.padded_selection()
    return {"t": inputs.packed(sel), "sel": sel, "fill": 0.5}


def _packed_scatter(inputs: Inputs) -> Arguments:
    sel = inputs.packed_selection()
    return {"t": inputs.packed(sel), "sel": sel}


def _plain_scatter(t: Tensor, sel: TokenSelection) -> Call:
    positions = real_rows(sel.mask)

    def call() -> Tensor:
        out = t.new_zeros((sel.mask.numel(), t.shape[1]))
        out[positions] = t
        return out.view(*sel.mask.shape, t.shape[1])

    return call


OPERATIONS = (
    Operation(
        ops.gather_tokens,
        plain=_plain_gather,
        cases={
            "default": Case(_gather, gradients=("x",)),
            "trained_bias": Case(_gather),
            "shared": Case(_shared_gather),
            "packed": Case(_packed_gather),
            "padded": Case(lambda inputs: {"x": inputs.tokens(), "sel": inputs.padded_selection()}),
        },
        forward_reads=(),
        forward_reads_kept=("x", "bias"),
        backward_writes=("x",),
    ),
    Operation(
        ops.scatter_tokens,
        plain=_plain_scatter,
        cases={"default": Case(_scatter), "packed": Case(_packed_scatter), "padded": Case(_padded_scatter)},
        forward_reads=("t",),
        backward_writes=("t",),
    ),
)
