"""A training step as CUDA graphs: the forward and backward pass, clipping, the optimiser and the averages.

A step of a DC-DiT is three graphs, as a call of :class:`dcdit.graphs.ExactGraphedDenoiser` is: encoder, router and
selection; what needs no selection, while the number of kept tokens is on its way to the host; and all the rest, with
the packed buffer rounded up to the next of a few sizes. The backward pass through the first two is a part of the third.
A step of a static model is one graph.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcdit.config import TrainConfig
from dcdit.diffusion import NoisyBatch, Objective
from dcdit.graphs.exact import sizes_of
from dcdit.graphs.safety import waits_in_attention
from dcdit.models import DCDiT, DiT, Routing
from dcdit.models.dc_dit import Encoded, Prepared
from dcdit.ops import TokenSelection
from dcdit.train.ema import EMA
from dcdit.train.losses import Ran, autocast, losses_of, training_losses
from dcdit.train.optimizer import clipped_step
from dcdit.train.schedule import drop_fraction
from dcdit.utils import cuda
from dcdit.utils.modules import unwrap_model

logger = logging.getLogger(__name__)
Taken = tuple[dict[str, Tensor], Tensor | None]
"""Metrics and kept lengths."""
EAGER_STEPS = 2
"""First steps of a process. They make the moments of the optimiser and load the kernels of the update."""
MAX_GRAPHS = 32
"""Sizes of the packed buffer to keep; the one that was not used for longest goes first."""


def step_obstacle(config: TrainConfig, net: Any, processes: int = 1) -> str | None:
    """Why the training steps of a model cannot be captured; None if they can."""
    model, optim = unwrap_model(net), config.optim
    device = next(model.parameters()).device
    if not cuda.has_graphs(device):
        return f"the model is on {device}; CUDA graphs need a CUDA device"
    if processes > 1:
        return f"there are {processes} processes, whose gradients are averaged in between; accepted: one"
    if optim.accumulate > 1:
        return f"optim.accumulate is {optim.accumulate}; accepted: 1, for the update is a part of the graph"
    if not isinstance(model, DCDiT | DiT):
        return f"a {type(model).__name__} reads on the host how many tokens it keeps; accepted: a DC-DiT or a DiT"
    if model.config.gate_shape is not None:
        return "its width is dynamic, and its loss changes from step to step; accepted: a fixed width"
    if isinstance(model, DCDiT) and net is not model:
        return "optim.compile is true, and a DC-DiT in graphs runs part by part; accepted: one of the two"
    if isinstance(model, DCDiT) and waits_in_attention(model, dtype_of(optim.precision)):
        return f"attention in {optim.precision} reads lengths on the host; accepted: optim.precision bf16"
    return None


class GraphedStep:
    """Takes training steps. A size that comes up for the first time is captured, so that step takes longer.

    The random numbers of a step are drawn outside. What the graphs read and write stays in place: weights, averages and
    moments may be changed, but not replaced. At a call the weights have no gradients, and no result of a plain step
    that still knows its gradients is alive: autograd would take its stream into the capture.

    Args:
        config: of the run.
        net: the model, or a compiled static one, on a CUDA device.
        objective: of the run.
        optimizer: over all parameters of the model.
        ema: their averages.
        optional: a capture that fails is logged, and steps are to be plain ones from then on.

    Raises:
        ValueError: such steps cannot be captured (:func:`step_obstacle`).
    """

    def __init__(
        self,
        config: TrainConfig,
        net: Any,
        objective: Objective,
        optimizer: torch.optim.AdamW,
        ema: EMA,
        optional: bool = False,
    ) -> None:
        if obstacle := step_obstacle(config, net):
            raise ValueError(f"the training step cannot be captured: {obstacle}")
        self._config, self._net, self._model = config, net, unwrap_model(net)
        self._objective, self._optimizer, self._ema = objective, optimizer, ema
        self._weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self._device = self._weights[0].device
        self._lr = torch.zeros((), device=self._device)
        self._eager_steps, self._optional, self._failed = EAGER_STEPS, optional, False
        self._inputs: _Inputs | None = None
        self._before: _Before | None = None
        self._graphs: dict[tuple[int, int], cuda.Captured] = {}
        self._names: list[str] = []
        self._pool = cuda.driver.new_pool()
        # A backward pass runs on the streams of its forward pass, so all is captured on one.
        self._stream = cuda.driver.new_stream(self._device)

    def __call__(self, step: int, noisy: NoisyBatch, y: Tensor) -> Taken | None:
        """Take a step.

        Args:
            step: steps done before this one.
            noisy: the images, as many at each call.
            y: (B,) labels, some of them dropped.

        Returns:
            The metrics () and the kept lengths of :func:`dcdit.train.losses.training_losses`, with ``grad_norm``. The
            next step overwrites the lengths. None if nothing was done and the step is to be a plain one: the first ones
            of a process, those in which the target of the ratio loss changes, and all after a capture that failed.

        Raises:
            CaptureError: a capture failed, and it is not optional.
        """
        self._eager_steps -= 1
        if self._eager_steps >= 0 or step < self._config.router.target_warmup_steps or self._failed:
            return None
        try:
            return self._take(step, noisy, y)
        except cuda.CaptureError as error:
            if not self._optional:
                raise
            logger.warning("training goes on without CUDA graphs: %s", error)
            self._failed = True
            self._before, self._inputs = None, None
            self._graphs.clear()
            return None

    def _take(self, step: int, noisy: NoisyBatch, y: Tensor) -> Taken:
        rho = drop_fraction(self._config.router, self._config.optim.seed, step)
        if self._inputs is None:
            drop = torch.zeros(y.shape, device=self._device)
            self._inputs = _Inputs(NoisyBatch(*(part.clone() for part in noisy)), y.clone(), drop)
        for mine, given in zip((*self._inputs.noisy, self._inputs.y), (*noisy, y), strict=True):
            mine.copy_(given)
        self._inputs.drop.fill_(rho)
        self._lr.fill_(self._optimizer.param_groups[0]["lr"])
        metrics, lengths = self._step_of_dc_dit() if isinstance(self._model, DCDiT) else (self._step_of_dit(), None)
        return dict(zip(self._names, metrics.clone().unbind(), strict=True)), lengths

    def _step_of_dit(self) -> Tensor:
        def passes() -> dict[str, Tensor]:
            assert self._inputs is not None
            metrics, _ = training_losses(
                self._config, 0, self._net, self._objective, self._inputs.noisy, self._inputs.y, None
            )
            return self._backward(metrics, retain=False)

        graph = self._graph((0, 0), passes, "a training step")
        graph.replay()
        out: Tensor = graph.outputs
        return out

    def _step_of_dc_dit(self) -> tuple[Tensor, Tensor]:
        inputs = self._inputs
        assert inputs is not None
        before = self._before
        if before is None:
            routed = self._capture(lambda: self._route(inputs), "encoder and router in training")
            prepared = self._capture(lambda: self._prepare(routed.outputs), "the modulation in training")
            before = self._before = _Before(routed, prepared)
        before.routed.replay()
        routed_now: _Routed = before.routed.outputs
        pending = cuda.PendingRead(routed_now.sizes)
        before.prepared.replay()
        total, longest = pending.wait()
        positions = routed_now.sel.mask.numel()
        rows, bound = sizes_of(total, longest, positions, self._model.config, self._device)
        sel = routed_now.sel._replace(indices=routed_now.sel.indices[:rows], max_seqlen=bound)

        def passes() -> dict[str, Tensor]:
            metrics = self._losses(inputs, routed_now.encoded, before.prepared.outputs, sel)
            return self._backward(metrics, retain=True)

        graph = self._graph((rows, bound), passes, f"the training step on {rows} rows")
        graph.replay()
        return graph.outputs, routed_now.sel.lengths

    def _route(self, inputs: "_Inputs") -> "_Routed":
        with autocast(self._config.optim, self._device), _unversioned():
            encoded = self._model.encode(inputs.noisy.x, inputs.noisy.time, inputs.y)
            sel = self._model.chunk.start(encoded.prob, inputs.drop, capacity=encoded.prob.numel()).wait()
        return _Routed(encoded, sel, torch.stack([sel.cu_seqlens[-1], sel.lengths.max()]))

    def _prepare(self, routed: "_Routed") -> Prepared:
        with autocast(self._config.optim, self._device), _unversioned():
            prepared: Prepared = self._model.prepare(routed.encoded)
            return prepared

    def _losses(
        self, inputs: "_Inputs", encoded: Encoded, prepared: Prepared, sel: TokenSelection
    ) -> dict[str, Tensor]:
        with autocast(self._config.optim, self._device):
            packed = self._model.chunk.pack(encoded.tokens, sel, self._model.pos_embed)
            out = self._model.decode(encoded, prepared, packed, sel, padding=True)
        routing = Routing(encoded.prob, sel.mask, sel.natural_mask, sel)
        ran = Ran(out, {"drop_fraction": inputs.drop}, routing)
        # The step only decides on the target of the ratio loss, which no longer changes.
        step = self._config.router.target_warmup_steps
        return losses_of(self._config, step, self._model, self._objective, inputs.noisy, ran)[0]

    def _backward(self, metrics: dict[str, Tensor], retain: bool) -> dict[str, Tensor]:
        """Gradients for all weights. ``retain``: other sizes go back through the same encoder."""
        metrics["loss"].backward(retain_graph=retain)
        return {name: value.detach() for name, value in metrics.items()}

    def _graph(self, size: tuple[int, int], passes: Callable[[], dict[str, Tensor]], what: str) -> cuda.Captured:
        graph = self._graphs.pop(size, None)
        if graph is None:

            def take() -> Tensor:
                metrics = passes()
                metrics["grad_norm"] = clipped_step(self._optimizer, self._config.optim.grad_clip)
                self._forget_gradients()
                self._ema.update()
                self._names = list(metrics)
                return torch.stack([value.float() for value in metrics.values()])

            def rehearse() -> None:
                passes()
                self._forget_gradients()

            with _capturable(self._optimizer, self._lr):
                graph = self._capture(take, what, rehearse)
        self._graphs[size] = graph
        while len(self._graphs) > MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return graph

    def _forget_gradients(self) -> None:
        """Their memory is for the next size."""
        for weight in self._weights:
            weight.grad = None

    def _capture(
        self, function: Callable[[], object], what: str, rehearsal: Callable[[], object] | None = None
    ) -> cuda.Captured:
        return cuda.capture(
            function, self._device, self._pool, what, warmup=1, rehearsal=rehearsal, stream=self._stream
        )


class _Inputs(NamedTuple):
    """What the graphs read."""

    noisy: NoisyBatch
    y: Tensor
    drop: Tensor
    """(B,) float32."""


class _Routed(NamedTuple):
    """What the first graph leaves behind."""

    encoded: Encoded
    sel: TokenSelection
    """With as many rows as there are positions."""
    sizes: Tensor
    """(2,) int32: kept tokens of the batch, and of its longest image."""


class _Before(NamedTuple):
    """The graphs before the number of rows is known."""

    routed: cuda.Captured
    prepared: cuda.Captured


def dtype_of(precision: str) -> torch.dtype:
    """Of the activations."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


@contextlib.contextmanager
def _capturable(optimizer: torch.optim.AdamW, lr: Tensor) -> Iterator[None]:
    """Inside, the optimiser reads its learning rate on the device."""
    before = [(group["capturable"], group["lr"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["capturable"], group["lr"] = True, lr
    try:
        yield
    finally:
        for group, (capturable, number) in zip(optimizer.param_groups, before, strict=True):
            group["capturable"], group["lr"] = capturable, number


def _unversioned() -> contextlib.AbstractContextManager[object]:
    """Let a backward pass be captured after the weights have changed: at replay it comes before they do.

    Without hooks, autograd compares the versions of what it saved with those of the moment of the backward pass.
    """
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda saved: saved)
