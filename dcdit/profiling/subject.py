"""A model as it draws, to be timed: what is called, and what a call costs."""

from dataclasses import fields
from functools import partial
from typing import Any

from torch import Tensor

from dcdit.models import DCDiT, DCDiTConfig, DiTConfig, DyDiT, ModelConfig, SlicedModel, SparseDiT, count_flops
from dcdit.models.sparse_dit import images_by_grid
from dcdit.profiling.timing import Call

DynamicModel = DCDiT | DyDiT | SparseDiT
STATIC_PATCHES = (1, 2)


class Subject:
    """Forward passes of a model on one batch. One of dynamic width runs with its slices.

    Args:
        model: in evaluation mode.
        x, t, y: a batch as the model takes it. With dynamic width all of t is the same timestep.

    Raises:
        ValueError: several timesteps for a model of dynamic width.
    """

    def __init__(self, model: DynamicModel, x: Tensor, t: Tensor, y: Tensor) -> None:
        self.model, self._inputs = model, (x, t, y)
        self.runs: Any = model
        """What is called."""
        if isinstance(model, SparseDiT) or model.config.gate_shape is None:
            return
        if len(t.unique()) > 1:
            raise ValueError(
                f"t holds {len(t.unique())} timesteps; accepted: one, at which the model of dynamic width is cut"
            )
        self.runs = SlicedModel(model, t[:1].tolist())

    def call(self, drop_fraction: float) -> Call:
        """A forward pass."""
        return partial(self.runs, *self._inputs, **self._options(drop_fraction))

    def cost(self, drop_fraction: float) -> tuple[dict[str, int], float]:
        """FLOPs of a forward pass by stage (:func:`dcdit.models.count_flops`), and the share of the tokens it keeps.

        Of a SparseDiT these are its sparse tokens, of a DyDiT the tokens in its MLPs.
        """
        config, images = self.model.config, len(self._inputs[0])
        if isinstance(self.model, SparseDiT):
            groups = images_by_grid(self.model.config, self._inputs[1])
            lengths = [height * width for (height, width), group in groups.items() for _ in group]
            return count_flops(config, lengths), sum(lengths) / images / self.model.config.tokens
        if isinstance(self.model, DyDiT):
            _, gates = self.runs(*self._inputs, return_gates=True)
            return count_flops(config, batch=images, gates=gates.counts()), float(gates.tokens.mean())
        _, routing = self.runs(*self._inputs, **self._options(drop_fraction), return_routing=True)
        lengths = routing.selection.lengths.tolist()
        counts = None if routing.gates is None else routing.gates.counts()
        return count_flops(config, lengths, gates=counts), sum(lengths) / routing.mask.numel()

    def _options(self, drop_fraction: float) -> dict[str, float]:
        if isinstance(self.model, DCDiT):
            return {"drop_fraction": drop_fraction}
        if drop_fraction:
            raise ValueError(
                f"drop fraction {drop_fraction:g} of a {type(self.model).__name__}; accepted: 0, it drops none"
            )
        return {}


def static_counterparts(config: ModelConfig) -> dict[str, DiTConfig]:
    """Static DiTs with the same transformer on the same input, at the patch size of the model.

    A DC-DiT has none. Its counterparts are those of the patch sizes that divide the grid.
    """
    shared = {f.name for f in fields(DiTConfig)} & {f.name for f in fields(config)} - {"patch_size"}
    common = {name: getattr(config, name) for name in shared}
    patches = STATIC_PATCHES if isinstance(config, DCDiTConfig) else (config.patch_size,)
    return {
        f"static DiT, patch {patch}": DiTConfig(**common, patch_size=patch)
        for patch in patches
        if not any(side % patch for side in config.grid)
    }
