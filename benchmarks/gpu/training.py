"""A training step of DC-DiT and of the static DiT as the recipe runs it, and in graphs, at several drop fractions."""

import argparse
import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import sides
from benchmarks.gpu.figures import interval, times, warnings
from benchmarks.gpu.lines import Lines
from benchmarks.gpu.setting import Setting
from benchmarks.harness.equality import TOLERANCE, check_equal
from benchmarks.harness.recipe_step import RecipeStep
from benchmarks.harness.static import CompiledDiT, choose_sdpa
from dcdit import ops
from dcdit.models import count_flops
from dcdit.profiling.timing import time_rounds

STATIC, DYNAMIC = "static, compiled", "DC-DiT"
CHECKED_IMAGES = 2
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
        """The same loss and gradients on the kernels and on plain PyTorch; and of the static model, compiled or not."""
        x, _, y = (tensor[:CHECKED_IMAGES] for tensor in self.batch)
        tolerance = TOLERANCE[self.setting.dtype]
        model = self.dynamic.model
        plain = [_loss_and_gradients(self.dynamic, x, y, model, backend) for backend in ("torch", None)]
        check_equal("loss and gradients of DC-DiT", plain[1], plain[0], tolerance)
        static = self.static.model
        forms = []
        for net in (static, self.static.net):
            self.static.net, kept = net, self.static.net
            forms.append(_loss_and_gradients(self.static, x, y, static, None))
            self.static.net = kept
        check_equal("loss and gradients of the static DiT", forms[1], forms[0], tolerance)
        return {"compared": ["DC-DiT: kernels and plain PyTorch", "static DiT: compiled and not"]}

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


def _loss_and_gradients(step: RecipeStep, x: Tensor, y: Tensor, model: nn.Module, backend: str | None) -> list[Tensor]:
    """The loss, and all gradients as one vector: single ones may be tiny."""
    given, step.x, step.y = (step.x, step.y), x, y
    group, step.config.router.group_size = step.config.router.group_size, None
    try:
        if backend is None:
            metrics = step.backward(0.2)
        else:
            with ops.use_backend(backend):
                metrics = step.backward(0.2)
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return [metrics["loss"].detach(), torch.cat(gradients)]
    finally:
        step.x, step.y = given
        step.config.router.group_size = group
        step.optimizer.zero_grad(set_to_none=True)


def create(group: str, setting: Setting, lines: Lines, arguments: argparse.Namespace) -> TrainingCases:
    return TrainingCases(setting)
