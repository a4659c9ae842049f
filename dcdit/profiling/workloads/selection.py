"""Token selection: two sorts for the ranks and one for the packed order, as the official code of DC-DiT does it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit import ops
from dcdit.ops import TokenSelection
from dcdit.profiling.workloads.core import Arguments, Call, Case, Inputs, Operation


def _exact(inputs: Inputs) -> Arguments:
    return {"p": inputs.probabilities()}


def _drop(inputs: Inputs) -> Arguments:
    p = inputs.probabilities()
    return {"p": p, "drop_fraction": 0.3, "capacity": p.numel()}


def _token_dtype(inputs: Inputs) -> Arguments:
    return {"p": inputs.probabilities(inputs.shape.dtype), "drop_fraction": 0.2}


def _drop_per_image(inputs: Inputs) -> Arguments:
    fractions = torch.linspace(0, 0.6, inputs.shape.batch, device=inputs.shape.device)
    return {"p": inputs.probabilities(inputs.shape.dtype), "drop_fraction": fractions}


def _budget(inputs: Inputs) -> Arguments:
    return {"p": inputs.probabilities(inputs.shape.dtype), "budget": max(1, inputs.shape.length // 4)}


def _capacity(inputs: Inputs) -> Arguments:
    """So small that some images must give up tokens."""
    capacity = max(inputs.shape.batch, int(inputs.shape.keep * inputs.shape.batch * inputs.shape.length / 2))
    return {"p": inputs.probabilities(inputs.shape.dtype), "capacity": capacity}


def _max_seqlen(inputs: Inputs) -> Arguments:
    """Below what some images keep, with a capacity that some overflow too."""
    return {**_capacity(inputs), "max_seqlen": max(1, int(inputs.shape.keep * inputs.shape.length))}


def _always(inputs: Inputs) -> Arguments:
    """Some tokens always stay, and a capacity must drop others."""
    p = inputs.probabilities(inputs.shape.dtype)
    always = torch.arange(inputs.shape.length, device=p.device) % 16 == 3
    return {**_capacity(inputs), "p": p, "drop_fraction": 0.3, "always": always.expand(p.shape)}


def _extra_tokens(inputs: Inputs) -> Arguments:
    return {"p": inputs.probabilities(), "extra_tokens": 3}


def _packed(inputs: Inputs) -> Arguments:
    return {"p": inputs.packed_probabilities(inputs.shape.dtype), "cu_seqlens": inputs.source_cu_seqlens()}


def _packed_capacity(inputs: Inputs) -> Arguments:
    return {**_packed(inputs), "capacity": _capacity(inputs)["capacity"]}


def _plain(p: Tensor, drop_fraction: float = 0.0, capacity: int | None = None) -> Call:
    """Returns mask, natural mask, lengths, cu_seqlens, kept positions (B, M) in order, and which of them are real.

    M is the longest kept length. A capacity changes nothing here: the published code has no buffer of a fixed size.
    """
    length = p.shape[1]

    def call() -> tuple[Tensor, ...]:
        natural = mask = torch.stack((1 - p, p), dim=-1).argmax(-1) == 1
        if drop_fraction > 0:
            rank = p.masked_fill(~natural, torch.inf).argsort(dim=1).argsort(dim=1)
            drop = (natural.sum(1, keepdim=True).float() * drop_fraction).long()
            mask = natural & (rank >= drop)
        lengths = mask.sum(1)
        longest = int(lengths.max())
        others = p.masked_fill(mask, -torch.inf)
        last = length + (-others).argsort(dim=1).argsort(dim=1)
        position = torch.arange(length, device=p.device)
        order = torch.where(mask, position, last).argsort(dim=1)[:, :longest]
        real = torch.arange(longest, device=p.device) < lengths[:, None]
        return mask, natural, lengths, F.pad(lengths.cumsum(0), (1, 0)).int(), order, real

    return call


def _mask(inputs: Inputs) -> Arguments:
    return {"mask": inputs.probabilities() > 0.5}


def _capacity_mask(inputs: Inputs) -> Arguments:
    return {**_mask(inputs), "capacity": _capacity(inputs)["capacity"]}


def _packed_mask(inputs: Inputs) -> Arguments:
    return {"mask": inputs.packed_probabilities() > 0.5, "cu_seqlens": inputs.source_cu_seqlens()}


def _plain_mask(mask: Tensor) -> Call:
    """The same results as :func:`_plain`, of a mask."""
    length = mask.shape[1]

    def call() -> tuple[Tensor, ...]:
        lengths = mask.sum(1)
        longest = int(lengths.max())
        position = torch.arange(length, device=mask.device)
        order = torch.where(mask, position, length + position).argsort(dim=1)[:, :longest]
        real = torch.arange(longest, device=mask.device) < lengths[:, None]
        return mask, mask, lengths, F.pad(lengths.cumsum(0), (1, 0)).int(), order, real

    return call


def _comparable(sel: Any) -> tuple[Tensor, ...]:
    """A selection, ours or the plain one: mask, natural mask, lengths, cu_seqlens, kept positions in packed order."""
    if isinstance(sel, TokenSelection):
        kept = sel.indices[sel.indices >= 0]
        return sel.mask, sel.natural_mask, sel.lengths.long(), sel.cu_seqlens, kept
    mask, natural, lengths, cu_seqlens, order, real = sel
    start = torch.arange(mask.shape[0], device=mask.device)[:, None] * mask.shape[1]
    return mask, natural, lengths, cu_seqlens, (order + start)[real]


OPERATIONS = (
    Operation(
        ops.select_tokens,
        plain=_plain,
        cases={
            "default": Case(_exact),
            "drop": Case(_drop, timed=True),
            "token_dtype": Case(_token_dtype),
            "drop_per_image": Case(_drop_per_image),
            "budget": Case(_budget),
            "capacity": Case(_capacity),
            "max_seqlen": Case(_max_seqlen),
            "always": Case(_always),
            "extra_tokens": Case(_extra_tokens),
            "packed": Case(_packed),
            "packed_capacity": Case(_packed_capacity),
        },
        forward_reads=("p",),
        comparable=_comparable,
    ),
    Operation(
        ops.select_from_mask,
        plain=_plain_mask,
        cases={"default": Case(_mask), "capacity": Case(_capacity_mask), "packed": Case(_packed_mask)},
        forward_reads=("mask",),
        comparable=_comparable,
    ),
)
