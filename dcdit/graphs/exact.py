"""Exact mode without its cost on the host: the part after the selection as one graph for each number of rows.

Which tokens are kept is known only when the router has run. So a forward pass is three graphs: encoder, router and
selection; what needs no selection, while the number of kept tokens is on its way to the host; and the rest, with the
packed buffer rounded up to the next of a few sizes. The rows between are padding, as with a capacity.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcdit.graphs.inputs import ForwardInputs
from dcdit.graphs.safety import FixedModel, autocast_dtype, graph_obstacle
from dcdit.models import DCDiT, DCDiTConfig, Routing
from dcdit.models.capacity import TILE, last_row_of_waves, multiprocessors_of
from dcdit.models.dc_dit import Encoded, Prepared
from dcdit.ops import TokenSelection
from dcdit.utils import cuda
from dcdit.utils.recent import RecentlyUsed

MAX_BATCHES = 4
"""Numbers of images to keep."""


class ExactGraphedDenoiser:
    """A DC-DiT in graphs that keeps exactly the tokens of exact mode. It is called like the model.

    Graphs are captured when their number of images and rows first comes up: a call that meets a new size takes longer.
    It keeps the model alive. What it forbids stands in :mod:`dcdit.graphs`.

    Args:
        model: a DC-DiT in evaluation mode on a CUDA device.
        max_graphs: sizes of the packed buffer to keep for each number of images; the one that was not used for longest
            goes first. So are numbers of images beyond four; each autocast dtype counts as another.

    Raises:
        ValueError: the model cannot be captured (:func:`dcdit.graphs.graph_obstacle`).

    Example:
        >>> from dcdit.graphs import ExactGraphedDenoiser
        >>> from dcdit.models import create_model
        >>> model = create_model("DC-DiT-S", grid=(4, 4), hidden_size=128, depth=1, num_heads=2).eval()
        >>> ExactGraphedDenoiser(model)  # on a GPU: sample(ExactGraphedDenoiser(model.cuda()), labels)
        Traceback (most recent call last):
            ...
        ValueError: the model is on cpu; CUDA graphs need a CUDA device
    """

    def __init__(self, model: DCDiT, max_graphs: int = 16) -> None:
        if max_graphs < 1:
            raise ValueError(f"max_graphs is {max_graphs}; accepted: at least 1")
        positions = model.config.grid[0] * model.config.grid[1]
        if obstacle := graph_obstacle(model, capacity=positions):
            raise ValueError(obstacle)
        self.config, self.objective = model.config, model.objective
        self._fixed, self._max_graphs = FixedModel(model), max_graphs
        self._device = next(model.parameters()).device
        self._pool = cuda.new_pool(self._device)
        self._batches: RecentlyUsed[tuple[int, torch.dtype | None], _Batch] = RecentlyUsed(MAX_BATCHES)

    @torch.no_grad()
    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor, drop_fraction: float | Tensor = 0.0, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """The model's output for a batch, as fresh tensors; arguments as in :meth:`dcdit.models.DCDiT.forward`.

        Raises:
            ValueError: the model changed since it was captured, no image, or inputs that the model refuses.
            CaptureError: the capture of a new size failed; ``__cause__`` says why.
        """
        self._fixed.check()
        if not len(x):
            raise ValueError("x holds 0 images; accepted: at least 1")
        batch = self._batches.use(
            (len(x), autocast_dtype(self._device)),
            lambda: _Batch(self._fixed.model, len(x), self._pool, self._max_graphs),
        )
        return batch.run(x, t, y, drop_fraction, return_routing)


class Routed(NamedTuple):
    """What the first graph leaves behind."""

    encoded: Encoded
    sel: TokenSelection
    """With as many rows as there are positions."""
    sizes: Tensor
    """(2,) int32: kept tokens of the batch, and of its longest image."""


def route(model: DCDiT, x: Tensor, t: Tensor, y: Tensor, drop: Tensor) -> Routed:
    """What the first graph holds: encoder, router and selection, whose number of tokens nobody waits for."""
    encoded = model.encode(x, t, y)
    sel = model.chunk.start(encoded.prob, drop, capacity=encoded.prob.numel()).wait()
    return Routed(encoded, sel, torch.stack([sel.cu_seqlens[-1], sel.lengths.max()]))


def decode(model: DCDiT, routed: Routed, prepared: Prepared, rows: int, bound: int) -> Tensor:
    """What the last graph holds: the rest of the forward pass, on so many rows and images of at most that length."""
    sel = routed.sel._replace(indices=routed.sel.indices[:rows], max_seqlen=bound)
    packed = model.chunk.pack(routed.encoded.tokens, sel, model.pos_embed)
    return model.decode(routed.encoded, prepared, packed, sel, padding=True)


class _Batch:
    """The graphs for one number of images."""

    def __init__(self, model: Any, images: int, pool: cuda.Pool, max_graphs: int) -> None:
        self._model, self._pool, self._inputs = model, pool, ForwardInputs(model, images)
        self._device, self._rows = self._inputs.x.device, images * model.config.grid[0] * model.config.grid[1]
        self._routed: cuda.Captured | None = None
        self._prepared: cuda.Captured | None = None
        self._decoded: RecentlyUsed[tuple[int, int], cuda.Captured] = RecentlyUsed(max_graphs)

    def run(
        self, x: Tensor, t: Tensor, y: Tensor, drop: float | Tensor, return_routing: bool
    ) -> Tensor | tuple[Tensor, Routing]:
        inputs = self._inputs
        inputs.copy(x, t, y, drop)
        if self._routed is None:
            self._routed = cuda.capture(
                lambda: route(self._model, inputs.x, inputs.t, inputs.y, inputs.drop),
                self._device,
                self._pool,
                "encoder and router",
            )
        self._routed.replay()
        routed: Routed = self._routed.outputs
        pending = cuda.PendingRead(routed.sizes)
        if self._prepared is None:
            self._prepared = cuda.capture(
                lambda: self._model.prepare(routed.encoded), self._device, self._pool, "the modulation"
            )
        self._prepared.replay()
        total, longest = pending.wait()
        graph = self._graph_for(total, longest, routed, self._prepared.outputs)
        graph.replay()
        out = graph.outputs.clone()
        if not return_routing:
            return out
        copies: dict[str, Any] = {
            name: part.clone() for name, part in routed.sel._asdict().items() if isinstance(part, Tensor)
        }
        sel = routed.sel._replace(**copies)
        sel = sel._replace(indices=sel.indices[:total], max_seqlen=longest)
        return out, Routing(routed.encoded.prob.clone(), sel.mask, sel.natural_mask, sel)

    def _graph_for(self, total: int, longest: int, routed: Routed, prepared: Prepared) -> cuda.Captured:
        """The graph of the smallest size that holds so many rows, and images of that length."""
        rows, bound = sizes_of(total, longest, self._rows, self._model.config, self._device)
        return self._decoded.use(
            (rows, bound),
            lambda: cuda.capture(
                lambda: decode(self._model, routed, prepared, rows, bound),
                self._device,
                self._pool,
                f"the transformer on {rows} rows",
            ),
        )


def sizes_of(total: int, longest: int, most: int, config: DCDiTConfig, device: torch.device) -> tuple[int, int]:
    """Rows of the packed buffer, and a bound on the tokens of one image: the sizes for which a graph is captured.

    Args:
        total: kept tokens of the batch.
        longest: of one image.
        most: positions of the batch.
    """
    bound = config.grid[0] * config.grid[1]
    while bound % 2 == 0 and bound // 2 >= longest:
        bound //= 2
    return min(most, size_of(total, config, device)), bound


def size_of(total: int, config: DCDiTConfig, device: torch.device) -> int:
    """Rows of the packed buffer for so many tokens: the most that cost no wave of tiles more, a whole number of tiles.

    On a device without multiprocessors these are the next whole tiles.
    """
    multiprocessors = multiprocessors_of(device)
    if multiprocessors is None:
        return TILE[0] * -(-total // TILE[0])
    return last_row_of_waves(config, total, multiprocessors, TILE)
