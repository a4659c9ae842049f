"""The blocks of a model of dynamic width for the timesteps of a sampler, cut out of its weights once."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcdit.nn import Gates, WidthGates
from dcdit.nn.slicing import BlockSlicer


class SlicedBlocks(NamedTuple):
    """The blocks of one timestep."""

    blocks: Sequence[Any]
    """Those of a DyDiT are :class:`dcdit.nn.DenseDiTBlock`, those of a DC-DiT :class:`dcdit.nn.PackedDiTBlock`."""
    gates: Gates
    """Of one image; its ``tokens`` is None."""

    def gates_of(self, images: int) -> Gates:
        """The gates of a batch, all at this timestep."""
        return Gates(self.gates.heads.expand(images, -1, -1), self.gates.groups.expand(images, -1, -1), None)


class StepSlices(NamedTuple):
    """The blocks of several timesteps."""

    by_time: dict[float, SlicedBlocks]
    """From the timestep in float32."""
    nbytes: int
    """Of the copies of weights."""


@torch.no_grad()
def slice_blocks(blocks: Iterable[Any], width_gates: WidthGates, time: Tensor, times: Sequence[float]) -> StepSlices:
    """The blocks of each timestep. Where a block has the same gates at several of them, they share its slices.

    Args:
        blocks: of the model.
        width_gates: in evaluation mode.
        time: (n, D) embeddings of the timesteps.
        times: the n timesteps.

    Raises:
        ValueError: a layer of a block is not plain (:class:`dcdit.nn.slicing.BlockSlicer`).
    """
    slicers = [BlockSlicer(block, f"blocks.{number}") for number, block in enumerate(blocks)]
    gates = width_gates(time)
    patterns = [(gate > 0.5).tolist() for gate in gates[:2]]
    by_time = {}
    for number, t in enumerate(times):
        rows = zip(slicers, patterns[0][number], patterns[1][number], strict=True)
        chosen = [slicer.slice(tuple(heads), tuple(groups)) for slicer, heads, groups in rows]
        one = slice(number, number + 1)
        by_time[t] = SlicedBlocks(chosen, Gates(gates.heads[one], gates.groups[one], None))
    return StepSlices(by_time, sum(slicer.nbytes for slicer in slicers))
