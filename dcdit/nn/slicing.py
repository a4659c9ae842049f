"""Blocks with fewer heads and hidden units: the open gates of a block as really smaller matrices."""

import copy
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dcdit.nn.dit_block import DiTBlockBase
from dcdit.nn.plain import is_plain, runs_only_forward

Pattern = tuple[bool, ...]
"""Which gates of a block are open."""
Block = TypeVar("Block", bound=DiTBlockBase)


class _Pair(NamedTuple):
    """The layers in front of what is left out and behind it."""

    into: nn.Linear
    out: nn.Linear


class BlockSlicer(Generic[Block]):
    """Makes smaller blocks from one block. Slices of equal gates share their weights, which are copies.

    Args:
        block: its layers must be plain (:mod:`dcdit.nn.plain`). It is not changed. A later change of its weights does
            not reach the slices.
        name: of the block, for the message.

    Raises:
        ValueError: a hook, or a layer that does more than multiply by its weights, e.g. an adapter.
    """

    def __init__(self, block: Block, name: str) -> None:
        if not runs_only_forward(block):
            raise ValueError(f"{name} has hooks, which its slices would not run; remove them first")
        for layer in ("qkv", "proj", "fc1", "fc2"):
            if not is_plain(getattr(block, layer), nn.Linear):
                raise ValueError(
                    f"{name}.{layer} is a {type(getattr(block, layer)).__name__} that may do more than multiply by its "
                    "weights; accepted: plain linear layers (merge adapters, remove hooks)"
                )
        self._block = block
        self._attention = {(True,) * block.num_heads: _Pair(block.qkv, block.proj)}
        self._mlp: dict[Pattern, _Pair] = {}

    def slice(self, heads: Pattern, groups: Pattern) -> Block:
        """A block that computes the open heads and the open groups of hidden units, and nothing else."""
        if heads not in self._attention:
            self._attention[heads] = self._sliced(self._block.qkv, self._block.proj, heads)
        if groups not in self._mlp:
            whole = _Pair(self._block.fc1, self._block.fc2)
            self._mlp[groups] = whole if all(groups) else self._sliced(*whole, groups)
        block = copy.copy(self._block)
        vars(block)["_modules"] = {}
        block.num_heads = sum(heads)
        block.qkv, block.proj = self._attention[heads]
        block.fc1, block.fc2 = self._mlp[groups]
        return block

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        own = {weight.data_ptr() for weight in self._block.parameters()}
        pairs = [*self._attention.values(), *self._mlp.values()]
        weights = [weight for pair in pairs for layer in pair for weight in layer.parameters()]
        return sum(weight.nbytes for weight in weights if weight.data_ptr() not in own)

    @staticmethod
    def _sliced(into: nn.Linear, out: nn.Linear, gates: Pattern) -> _Pair:
        """The open parts of what lies between two layers. The first may compute several of it: q, k and v."""
        hidden = out.in_features
        is_open = torch.tensor(gates, device=out.weight.device).repeat_interleave(hidden // len(gates))
        columns = is_open.nonzero().squeeze(1)
        starts = torch.arange(0, into.out_features, hidden, device=columns.device)
        rows = (starts[:, None] + columns).flatten()
        return _Pair(
            _linear(into.weight[rows], None if into.bias is None else into.bias[rows]),
            _linear(out.weight[:, columns], out.bias),
        )


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
