"""A training step of DC-DiT and of the static DiT as the recipe runs it, and in graphs, at several drop fractions."""

import argparse
import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu import sides
from benchmarks.gpu.figures import interval, times, warnings
from benchmarks.gpu.lines import Lines
from benchmarks.gpu.setting import Setting
from benchmarks.harness.equality import TOLERANCE, check_accurate, check_equal, distance
from benchmarks.harness.recipe_step import RecipeStep
from benchmarks.harness.static import CompiledDiT, choose_sdpa
from dcdit import ops
from dcdit.diffusion import NoisyBatch
from dcdit.models import count_flops
from dcdit.nn import ChunkLayer
from dcdit.ops.token_selection import PendingSelection
from dcdit.profiling.timing import time_rounds
from dcdit.train.losses import training_losses

STATIC, DYNAMIC = "static, compiled", "DC-DiT"
CHECKED_IMAGES, CHECKED_DROP = 2, 0.2
Step = Callable[[float], object]
"""A whole step at a drop fraction."""
PASSES = 3
"""A backward pass costs two forward passes."""


class TrainingCases:
    """The cases of all drop fractions."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.device = setting, setting.device
        self.precision = "fp32" if setting.rehearsal else "bf16"
        dynamic, static = sides.create_dynamic(setting), sides.create_static(setting)
        size = setting.batches[0]
        self.batch = sides.create_batch(dynamic, size)
        sides.calibrate(dynamic.eval(), self.batch)
        x, _, y = self.batch
        choose_sdpa(static.config, size, self.device, torch.bfloat16)
        self.dynamic = RecipeStep(dynamic, x, y, self.precision)
        self.static = RecipeStep(static, x, y, self.precision, CompiledDiT(static, setting.compiler))
        self.static_flops = PASSES * count_flops(static.config, batch=size)["total"]

    @functools.cached_property
    def graphed(self) -> dict[str, Step]:
        """Both sides in graphs, which a rehearsal cannot capture."""
        sides = {STATIC: self.static, DYNAMIC: self.dynamic}
        if self.setting.rehearsal:
            return dict(sides)
        return {side: step.graphed() for side, step in sides.items()}

    def run(self, case: str) -> Mapping[str, Any]:
        if case == "equal":
            return self._equal()
        if case == "equal, graphs":
            return self._graphs_equal()
        rho = float(case.removeprefix("drop ").removesuffix(", graphs"))
        steps = self.graphed if case.endswith(", graphs") else {STATIC: self.static, DYNAMIC: self.dynamic}
        with torch.no_grad():
            metrics, lengths = self.dynamic.losses(rho)
        calls = {STATIC: partial(steps[STATIC], 0.0), DYNAMIC: partial(steps[DYNAMIC], rho)}
        rounds = time_rounds(calls, self.device, self.setting.seconds)
        flops = PASSES * count_flops(self.dynamic.model.config, lengths.tolist())["total"]
        factor = flops / self.static_flops
        return {
            "ms": times(rounds),
            "eta": {STATIC: interval(rounds.ratio(STATIC, DYNAMIC).scaled(factor))},
            "flops": flops,
            "static_flops": self.static_flops,
            "images": len(self.batch[0]),
            "kept": float(metrics["kept"]),
            "peak_gib": {side: self._peak(call) for side, call in calls.items()},
            "warnings": warnings(rounds, [(STATIC, DYNAMIC)]),
        }

    def _peak(self, call: Any) -> float | None:
        """GiB that are in use at most during a step, weights and moments of both models included."""
        if self.setting.rehearsal:
            return None
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30

    def _equal(self) -> Mapping[str, Any]:
        """Loss and gradients against those in float64: the kernels beside plain PyTorch, compiled beside not compiled.

        All sides keep the tokens that the definitions keep in float64: rounding to 16 bits would decide about many at
        the cut, and each of them changes the gradients by more than rounding does.
        """
        dynamic, static = self.dynamic.model, self.static.model
        inputs = _Inputs.of(self.dynamic)
        mask = _kept(dynamic, inputs)
        nets = {"dcdit": (dynamic, None), "plain": (dynamic, "reference")}
        static_nets = {"compiled": (self.static.net, None), "plain": (static, None)}
        with _keeping(dynamic, mask):
            off = {"DC-DiT": self._off("DC-DiT", self.dynamic, nets, inputs)}
        return {"off": {**off, "static DiT": self._off("static DiT", self.static, static_nets, inputs)}}

    def _off(
        self, what: str, step: RecipeStep, nets: Mapping[str, tuple[Any, str | None]], inputs: "_Inputs"
    ) -> dict[str, float]:
        """How far the gradients of each net and backend are from those in float64.

        Raises:
            NotEqualError: one is more than twice as far as that of the side "plain".
        """
        exact = copy.deepcopy(step.model).double()
        right = _loss_and_gradients(step, exact, exact, "reference", "fp32", inputs)
        del exact
        found = {
            side: _loss_and_gradients(step, net, step.model, backend, self.precision, inputs)
            for side, (net, backend) in nets.items()
        }
        plain, rounding = found["plain"], torch.finfo(self.setting.dtype).eps
        for side, (loss, gradients) in found.items():
            # A single number of the plain side may be exact by luck; a vector of millions is not.
            check_accurate(f"loss of {what}, {side}", [loss], plain[:1], right[:1], rounding)
            check_accurate(f"gradients of {what}, {side}", [gradients], plain[1:], right[1:], 0.0)
        return {side: distance(gradients, right[1]) for side, (_, gradients) in found.items()}

    def _graphs_equal(self) -> Mapping[str, Any]:
        """The loss and the gradient norm of the whole batch, in graphs and not."""
        for side, step in ((STATIC, self.static), (DYNAMIC, self.dynamic)):
            for rho in (0.2, 0.6):
                metrics = step.backward(rho)
                gradients = [p.grad for p in step.model.parameters() if p.grad is not None]
                expected = [metrics.pop("loss").detach(), torch.nn.utils.get_total_norm(gradients)]
                del metrics, gradients  # a capture must not meet the streams of their gradients
                step.optimizer.zero_grad(set_to_none=True)
                found = self.graphed[side](rho)
                if isinstance(found, dict):
                    found = [found["loss"], found["grad_norm"]]
                    check_equal(f"loss and gradient norm in graphs, {side}", found, expected, TOLERANCE[torch.bfloat16])
        return {"compared": [STATIC, DYNAMIC]}


class _Inputs(NamedTuple):
    """A few noisy images and their labels."""

    noisy: NoisyBatch
    y: Tensor

    @classmethod
    def of(cls, step: RecipeStep) -> "_Inputs":
        noisy, y = step.inputs(CHECKED_DROP)
        return cls(NoisyBatch(*(part[:CHECKED_IMAGES] for part in noisy)), y[:CHECKED_IMAGES])


class _KeptTokens(ChunkLayer):
    """Keeps the tokens of a mask, whatever the router says."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self._mask = mask

    def start(self, p: Tensor, *options: Any) -> PendingSelection:
        return PendingSelection(ops.select_from_mask(self._mask), None)


@torch.no_grad()
def _kept(model: Any, inputs: _Inputs) -> Tensor:
    """(B, L) bool: the tokens that a DC-DiT keeps by its definition in float64."""
    noisy, y = inputs
    with ops.use_backend("reference"):
        encoded = copy.deepcopy(model).double().encode(noisy.x, noisy.time, y)
        mask: Tensor = model.chunk.start(encoded.prob, CHECKED_DROP).wait().mask
    return mask


@contextlib.contextmanager
def _keeping(model: Any, mask: Tensor) -> Iterator[None]:
    """Inside the block a DC-DiT keeps the tokens of a mask."""
    chosen, model.chunk = model.chunk, _KeptTokens(mask)
    try:
        yield
    finally:
        model.chunk = chosen


def _loss_and_gradients(
    step: RecipeStep, net: Any, model: nn.Module, backend: str | None, precision: str, inputs: _Inputs
) -> list[Tensor]:
    """The loss, and all gradients as one vector: single ones may be tiny.

    Args:
        net: the model, or a form of it that is called in its place.
        backend: of the operations; None takes the default.
        precision: of the activations, as in the configuration of a run.
    """
    config = copy.deepcopy(step.config)
    config.optim.precision, config.router.group_size = precision, None
    with contextlib.nullcontext() if backend is None else ops.use_backend(backend):
        metrics, _ = training_losses(config, 0, net, step.objective, *inputs, None)
        metrics["loss"].backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return [metrics["loss"].detach(), torch.cat(gradients)]


def create(group: str, setting: Setting, lines: Lines, arguments: argparse.Namespace) -> TrainingCases:
    return TrainingCases(setting)
