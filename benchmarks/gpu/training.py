"""A training step of DC-DiT and of the static DiT as the recipe runs it, and in graphs, at several drop fractions."""

import argparse
from collections.abc import Mapping
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
GRAPHED = {STATIC: "static, compiled, graph", DYNAMIC: "DC-DiT, graphs"}
CHECKED_IMAGES = 2
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
        # In a rehearsal nothing can be captured.
        self.graphed = {
            side: step if setting.rehearsal else step.graphed()
            for side, step in ((STATIC, self.static), (DYNAMIC, self.dynamic))
        }
        for step in (self.static, self.dynamic):
            step(0.0)  # makes the moments of the optimiser
        self.static_flops = PASSES * count_flops(static.config, batch=size)["total"]

    def run(self, case: str) -> Mapping[str, Any]:
        if case == "equal":
            return self._equal()
        rho = float(case.removeprefix("drop "))
        with torch.no_grad():
            metrics, lengths = self.dynamic.losses(rho)
        calls = {
            STATIC: partial(self.static, 0.0),
            DYNAMIC: partial(self.dynamic, rho),
            GRAPHED[STATIC]: partial(self.graphed[STATIC], 0.0),
            GRAPHED[DYNAMIC]: partial(self.graphed[DYNAMIC], rho),
        }
        rounds = time_rounds(calls, self.device, 2 * self.setting.seconds)
        flops = PASSES * count_flops(self.dynamic.model.config, lengths.tolist())["total"]
        factor = flops / self.static_flops
        return {
            "ms": times(rounds),
            "eta": {
                STATIC: interval(rounds.ratio(STATIC, DYNAMIC).scaled(factor)),
                GRAPHED[STATIC]: interval(rounds.ratio(GRAPHED[STATIC], GRAPHED[DYNAMIC]).scaled(factor)),
            },
            "flops": flops,
            "static_flops": self.static_flops,
            "images": len(self.batch[0]),
            "kept": float(metrics["kept"]),
            "peak_gib": {side: self._peak(calls[side]) for side in (STATIC, DYNAMIC)},
            "warnings": warnings(rounds, [(STATIC, DYNAMIC), (GRAPHED[STATIC], GRAPHED[DYNAMIC])]),
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
        pairs = ["DC-DiT: kernels and plain PyTorch", "static DiT: compiled and not"]
        if not self.setting.rehearsal:
            for side, step in ((STATIC, self.static), (DYNAMIC, self.dynamic)):
                self._check_graph(side, step, tolerance)
                pairs.append(f"{side}: in graphs and not")
        return {"compared": pairs}

    def _check_graph(self, side: str, step: RecipeStep, tolerance: float) -> None:
        """Loss and gradient norm of the whole batch, at two drop fractions."""
        for rho in (0.2, 0.6):
            metrics = step.backward(rho)
            norm = torch.nn.utils.get_total_norm([p.grad for p in step.model.parameters() if p.grad is not None])
            expected = [metrics.pop("loss").detach(), norm]
            metrics.clear()
            step.optimizer.zero_grad(set_to_none=True)
            found, _ = self.graphed[side](rho)
            check_equal(
                f"loss and gradient norm in graphs, {side}", [found["loss"], found["grad_norm"]], expected, tolerance
            )


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
