"""A model of dynamic width that skips what its gates close."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dcdit.models.capacity import Capacity
from dcdit.models.dc_dit import DCDiT
from dcdit.models.dy_dit import DyDiT
from dcdit.models.slices import slice_blocks
from dcdit.nn.embedding import of_first_block
from dcdit.utils.modules import signature_of
from dcdit.utils.text import short


class SlicedModel:
    """A DyDiT, or a DC-DiT with ``dynamic_width``, prepared for the timesteps of a sampler and called like the model.

    The gates of heads and MLP groups depend on the timestep alone. So the weights of each step are cut out beforehand,
    as smaller matrices: once for each block and each set of open gates, however many steps have it. The copies take
    ``nbytes`` beside the model's own weights; a set with every gate open takes none. A DyDiT then runs each MLP on the
    tokens that pass its gate; on a GPU their number is read back in every block. The output is that of the model, up to
    rounding.

    The weights are those of this moment: after a change of the model make a new one.

    Args:
        model: in evaluation mode.
        times: timesteps that it will be called at, as the model takes them.

    Raises:
        ValueError: a model of fixed width or in training mode, no timestep, or a layer that cannot be cut (an adapter,
            a hook).

    Example:
        >>> import torch
        >>> from dcdit.models import DyDiT, DyDiTConfig, SlicedModel
        >>> model = DyDiT(DyDiTConfig(grid=(4, 4), hidden_size=32, depth=2, num_heads=4)).eval()
        >>> for parameter in model.parameters():
        ...     _ = torch.nn.init.normal_(parameter, std=0.1)
        >>> _ = torch.nn.init.constant_(model.width_gates.linear.bias, -99.0)  # closes all but the first of each block
        >>> sliced = SlicedModel(model, times=[999, 500, 0])
        >>> x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([500, 500]), torch.tensor([1, 7])
        >>> out = model(x, t, y)
        >>> torch.allclose(sliced(x, t, y), out, atol=1e-5), out.std().item() > 0.1, sliced.nbytes > 0
        (True, True, True)
    """

    def __init__(self, model: DyDiT | DCDiT, times: Sequence[float]) -> None:
        gates = getattr(model, "width_gates", None)
        if gates is None:
            raise ValueError(f"{type(model).__name__} has a fixed width; accepted: a DyDiT, or dynamic_width=True")
        if model.training:
            raise ValueError("the model is in training mode, in which gates are drawn; call model.eval() first")
        if not len(times):
            raise ValueError("times are empty; accepted: at least one timestep")
        self.config, self.objective = model.config, model.objective
        self.__signature__ = signature_of(model)
        self._model = model
        steps = torch.tensor(sorted(set(times)), dtype=torch.float32, device="cpu")
        with torch.no_grad():
            time = of_first_block(model.t_embedder(steps.to(model.pos_embed.device)))
        self._slices = slice_blocks(model.blocks, gates, time, steps.tolist())

    @property
    def nbytes(self) -> int:
        """Bytes of the copied weights."""
        return self._slices.nbytes

    def plan_capacity(self, batch: int, drop_fraction: float | Sequence[float] | Tensor = 0.0) -> Capacity:
        """As :meth:`dcdit.models.DCDiT.plan_capacity`."""
        plan: Capacity = self._model.plan_capacity(batch, drop_fraction)  # type: ignore[operator]
        return plan

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor, **options: Any) -> Any:
        """The model's output; arguments as in its ``forward``. All of t is the same timestep, one of ``times``.

        Raises:
            ValueError: another t.
        """
        found = sorted(set(t.float().tolist()))
        sliced = self._slices.by_time.get(found[0]) if len(found) == 1 else None
        if sliced is None:
            raise ValueError(
                f"t holds {short(found)}; accepted: one of the {len(self._slices.by_time)} timesteps that the model is "
                "sliced for, the same for all images"
            )
        return self._model(x, t, y, **options, sliced=sliced)
