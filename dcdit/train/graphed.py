"""A training step as CUDA graphs: the forward and backward pass, clipping, the optimiser and the averages.

A pass of a DC-DiT is three graphs, as a call of :class:`dcdit.graphs.ExactGraphedDenoiser` is: encoder, router and
selection; what needs no selection, while the number of kept tokens is on its way to the host; and all the rest, with
the packed buffer rounded up to the next of a few sizes. The backward pass through the first two is a part of the third.
A pass of a static model is one graph.

The last graph includes the update of the weights where a step is one pass of one process. Else it adds the gradients to
a buffer, which is averaged over the processes, and the update is a graph of its own.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcdit.config import TrainConfig
from dcdit.diffusion import NoisyBatch, Objective
from dcdit.graphs.exact import Routed, decode, route, sizes_of
from dcdit.graphs.safety import checks_obstacle, waits_in_attention
from dcdit.models import DCDiT, DiT, Routing
from dcdit.models.dc_dit import Prepared
from dcdit.train.ema import EMA
from dcdit.train.losses import Ran, autocast, losses_of, training_losses
from dcdit.train.optimizer import clipped_step
from dcdit.train.schedule import drop_fraction
from dcdit.utils import cuda
from dcdit.utils.modules import unwrap_model
from dcdit.utils.recent import RecentlyUsed

logger = logging.getLogger(__name__)
Taken = tuple[dict[str, Tensor], Tensor | None]
"""Metrics and kept lengths."""
PLAIN_STEPS = 2
"""First steps of a process. They make the moments of the optimiser and load the kernels of the update."""
MAX_GRAPHS = 32
"""Sizes of the packed buffer to keep; the one that was not used for longest goes first."""


def step_obstacle(config: TrainConfig, net: Any, processes: int) -> str | None:
    """Why the training steps of a model cannot be captured; None if they can."""
    model, optim = unwrap_model(net), config.optim
    device = next(model.parameters()).device
    if not cuda.has_graphs(device):
        return f"the model is on {device}; CUDA graphs need a CUDA device"
    if reads := checks_obstacle():
        return reads
    if optim.shard and processes > 1:
        return "the weights are sharded, and gathering them is no part of a graph"
    if processes > 1 and optim.graph is None:
        return f"nobody has tried it with GPUs of {processes} processes; optim.graph=true does"
    if not isinstance(model, DCDiT | DiT):
        return f"a {type(model).__name__} reads on the host how many tokens it keeps; accepted: a DC-DiT or a DiT"
    if model.config.gate_shape is not None:
        return "its width is dynamic, and its loss changes from step to step; accepted: a fixed width"
    if isinstance(model, DCDiT) and net is not model:
        return "optim.compile is true, and a DC-DiT in graphs runs part by part; accepted: one of the two"
    if isinstance(model, DCDiT) and waits_in_attention(model, compute_dtype(optim.precision)):
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
        processes: how many train together, each with the same weights.

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
        processes: int = 1,
    ) -> None:
        if obstacle := step_obstacle(config, net, processes):
            raise ValueError(f"the training step cannot be captured: {obstacle}")
        self._config, self._net, self._model = config, net, unwrap_model(net)
        self._objective, self._optimizer, self._ema = objective, optimizer, ema
        self._weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self._device = self._weights[0].device
        self._gradients: GradientBuffer | None = None
        if processes > 1 or config.optim.accumulate > 1:
            self._gradients = GradientBuffer(self._weights, processes)
        self._lr = torch.zeros((), device=self._device)
        self._plain_steps, self._failed = PLAIN_STEPS, False
        self._inputs: _Inputs | None = None
        self._before: _Before | None = None
        self._graphs: RecentlyUsed[tuple[int, int], cuda.Captured] = RecentlyUsed(MAX_GRAPHS)
        self._update_graph: cuda.Captured | None = None
        self._names: list[str] = []
        self._norm = torch.zeros((), device=self._device)
        self._pool = cuda.new_pool(self._device)

    def takes(self, step: int) -> bool:
        """Begin a step, and say whether it is taken in graphs, or to be a plain one.

        Plain are the first ones of a process, those in which the target of the ratio loss changes, and all after a
        capture that failed.
        """
        self._plain_steps -= 1
        if self._plain_steps >= 0 or step < self._config.router.target_warmup_steps or self._failed:
            return False
        self._lr.fill_(self._optimizer.param_groups[0]["lr"])
        if self._gradients is not None:
            self._gradients.clear()
        return True

    def run(self, step: int, noisy: NoisyBatch, y: Tensor) -> Taken | None:
        """A forward and a backward pass of a step.

        Args:
            step: steps done before this one.
            noisy: the images, as many at each call.
            y: (B,) labels, some of them dropped.

        Returns:
            The metrics () and the kept lengths of :func:`dcdit.train.losses.training_losses`. The next pass overwrites
            the lengths. None if a capture failed without ``optim.graph: true``: then nothing was done, and the
            gradients of the passes before are those of the weights, so this pass and the update are to be plain ones.

        Raises:
            CaptureError: a capture failed, with ``optim.graph: true``.
        """
        try:
            return self._run(step, noisy, y)
        except cuda.CaptureError as error:
            self._give_up(error)
            self._forget_gradients()
            if self._gradients is not None:
                self._gradients.give_back()
            return None

    def update(self) -> Tensor:
        """What ends a step: clipping, the optimiser, the averages. Returns the norm () of all gradients."""
        if self._gradients is None:  # it was a part of the pass
            return self._norm.clone()
        self._gradients.average()
        try:
            if self._update_graph is None:
                with _capturable(self._optimizer, self._lr):
                    self._update_graph = self._capture(self._update, "the update of the weights", lambda: None)
            self._update_graph.replay()
        except cuda.CaptureError as error:
            self._give_up(error)
            self._update()
        return self._norm.clone()

    def average_plain(self) -> None:
        """Average the gradients of plain passes over the processes, which no wrapper of the model does."""
        if self._gradients is not None:
            self._gradients.clear()
            self._gradients.add()
            self._gradients.average()
            self._gradients.give_back()

    def _give_up(self, error: cuda.CaptureError) -> None:
        """Take plain steps from now on, unless ``optim.graph: true`` asked for graphs."""
        if self._config.optim.graph:
            raise error
        logger.warning("training goes on without CUDA graphs: %s", error)
        self._failed = True
        self._before, self._inputs = None, None
        self._graphs.clear()

    def _run(self, step: int, noisy: NoisyBatch, y: Tensor) -> Taken:
        rho = drop_fraction(self._config.router, self._config.optim.seed, step)
        if self._inputs is None:
            drop = torch.zeros(y.shape, device=self._device)
            self._inputs = _Inputs(NoisyBatch(*(part.clone() for part in noisy)), y.clone(), drop)
        for mine, given in zip((*self._inputs.noisy, self._inputs.y), (*noisy, y), strict=True):
            mine.copy_(given)
        self._inputs.drop.fill_(rho)
        metrics, lengths = self._pass_of_dc_dit() if isinstance(self._model, DCDiT) else (self._pass_of_dit(), None)
        return dict(zip(self._names, metrics.clone().unbind(), strict=True)), lengths

    def _update(self) -> None:
        """With the gradients of the buffer, or those that the weights have."""
        if self._gradients is not None:
            self._gradients.give_back()
        self._norm.copy_(clipped_step(self._optimizer, self._config.optim.grad_clip))
        self._forget_gradients()
        self._ema.update()

    def _pass_of_dit(self) -> Tensor:
        def passes() -> dict[str, Tensor]:
            assert self._inputs is not None
            metrics, _ = training_losses(
                self._config, 0, self._net, self._objective, self._inputs.noisy, self._inputs.y, None
            )
            return self._backward(metrics, retain=False)

        graph = self._graph((0, 0), passes, "a training pass")
        graph.replay()
        out: Tensor = graph.outputs
        return out

    def _pass_of_dc_dit(self) -> tuple[Tensor, Tensor]:
        inputs = self._inputs
        assert inputs is not None
        before = self._before
        if before is None:
            routed = self._capture(lambda: self._route(inputs), "encoder and router in training")
            prepared = self._capture(lambda: self._prepare(routed.outputs), "the modulation in training")
            before = self._before = _Before(routed, prepared)
        before.routed.replay()
        routed_now: Routed = before.routed.outputs
        pending = cuda.PendingRead(routed_now.sizes)
        before.prepared.replay()
        total, longest = pending.wait()
        positions = routed_now.sel.mask.numel()
        rows, bound = sizes_of(total, longest, positions, self._model.config, self._device)

        def passes() -> dict[str, Tensor]:
            metrics = self._losses(inputs, routed_now, before.prepared.outputs, rows, bound)
            return self._backward(metrics, retain=True)

        graph = self._graph((rows, bound), passes, f"the training pass on {rows} rows")
        graph.replay()
        return graph.outputs, routed_now.sel.lengths

    def _route(self, inputs: "_Inputs") -> Routed:
        with autocast(self._config.optim, self._device), _unversioned():
            return route(self._model, inputs.noisy.x, inputs.noisy.time, inputs.y, inputs.drop)

    def _prepare(self, routed: Routed) -> Prepared:
        with autocast(self._config.optim, self._device), _unversioned():
            prepared: Prepared = self._model.prepare(routed.encoded)
            return prepared

    def _losses(
        self, inputs: "_Inputs", routed: Routed, prepared: Prepared, rows: int, bound: int
    ) -> dict[str, Tensor]:
        with autocast(self._config.optim, self._device):
            out = decode(self._model, routed, prepared, rows, bound)
        sel = routed.sel
        routing = Routing(routed.encoded.prob, sel.mask, sel.natural_mask, sel)
        ran = Ran(out, {"drop_fraction": inputs.drop}, routing)
        # The step only decides on the target of the ratio loss, which no longer changes.
        step = self._config.router.target_warmup_steps
        return losses_of(self._config, step, self._model, self._objective, inputs.noisy, ran)[0]

    def _backward(self, metrics: dict[str, Tensor], retain: bool) -> dict[str, Tensor]:
        """Gradients for all weights. ``retain``: other sizes go back through the same encoder."""
        (metrics["loss"] / self._config.optim.accumulate).backward(retain_graph=retain)
        return {name: value.detach() for name, value in metrics.items()}

    def _graph(self, size: tuple[int, int], passes: Callable[[], dict[str, Tensor]], what: str) -> cuda.Captured:
        def take() -> Tensor:
            metrics = passes()
            if self._gradients is None:
                self._update()
            else:
                self._gradients.add()
                self._forget_gradients()
            self._names = list(metrics)
            return torch.stack([value.float() for value in metrics.values()])

        def rehearse() -> None:
            passes()
            self._forget_gradients()

        def make() -> cuda.Captured:
            with _capturable(self._optimizer, self._lr):
                return self._capture(take, what, rehearse)

        return self._graphs.use(size, make)

    def _forget_gradients(self) -> None:
        """Their memory is for the next capture."""
        for weight in self._weights:
            weight.grad = None

    def _capture(
        self, function: Callable[[], object], what: str, rehearsal: Callable[[], object] | None = None
    ) -> cuda.Captured:
        return cuda.capture(function, self._device, self._pool, what, warmup=1, rehearsal=rehearsal)


class GradientBuffer:
    """The gradients of some weights in one piece of memory, in which they are added up over passes and processes."""

    def __init__(self, weights: Sequence[Tensor], processes: int) -> None:
        self._weights, self._processes = weights, processes
        self._used: list[tuple[Tensor, Tensor]] = []
        starts = [0]
        for weight in weights:  # each begins where vector loads may begin
            starts.append(-(-(starts[-1] + weight.numel()) // 64) * 64)
        self._flat = torch.zeros(starts.pop(), device=weights[0].device)
        # In the memory format of the weights, which fused kernels ask for.
        self._parts = [
            self._flat.as_strided(weight.shape, weight.stride(), start)
            for weight, start in zip(weights, starts, strict=True)
        ]

    def clear(self) -> None:
        self._flat.zero_()

    @torch.no_grad()
    def add(self) -> None:
        """Add the gradients that the weights have now. At each call the same weights have some."""
        pairs = zip(self._parts, self._weights, strict=True)
        self._used = [(part, weight) for part, weight in pairs if weight.grad is not None]
        gradients: Any = [weight.grad for _, weight in self._used]
        torch._foreach_add_([part for part, _ in self._used], gradients)

    def average(self) -> None:
        """Over the processes. Every process has to call this."""
        if self._processes > 1:
            torch.distributed.all_reduce(self._flat)
            self._flat.div_(self._processes)

    def give_back(self) -> None:
        """Let the weights have the sums as their gradients, but not frozen ones: weight decay would change those."""
        for part, weight in self._used:
            weight.grad = part


class _Inputs(NamedTuple):
    """What the graphs read."""

    noisy: NoisyBatch
    y: Tensor
    drop: Tensor
    """(B,) float32."""


class _Before(NamedTuple):
    """The graphs before the number of rows is known."""

    routed: cuda.Captured
    prepared: cuda.Captured


def compute_dtype(precision: str) -> torch.dtype:
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
