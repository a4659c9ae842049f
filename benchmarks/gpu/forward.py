"""One forward of DC-DiT in every mode against the static DiT in its fastest form, at one batch size.

Every case times three sides in turns: the fastest static model that is started from Python, the fastest static model in
a CUDA graph, and the DC-DiT. The static sides are chosen when the process begins, among the forms of ``STATIC_FORMS``.
"""

import argparse
import copy
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import official
from benchmarks.gpu import sides
from benchmarks.gpu.figures import interval, times, warnings
from benchmarks.gpu.lines import LeftOut, Lines
from benchmarks.gpu.setting import Setting
from benchmarks.harness.equality import TOLERANCE, check_equal, check_kept
from benchmarks.harness.static import CompiledDiT, choose_sdpa
from dcdit import ops
from dcdit.graphs import ExactGraphedDenoiser, GraphedDenoiser
from dcdit.models import KeptShare, count_flops, plan_capacity
from dcdit.models.capacity import multiprocessors_of
from dcdit.profiling.device_timing import CapturedCalls
from dcdit.profiling.rounds import WHOLE, Rounds
from dcdit.profiling.timing import time_rounds, time_stages
from dcdit.utils import cuda

Forward = Callable[[], Any]
STATIC, STATIC_GRAPH = "static", "static graph"
CHECKED_IMAGES = 8
"""Images of a check in float32."""
MARGIN = 0.02
"""A capacity holds so much more than the batch keeps, and is then rounded up within a wave of tiles."""


class ForwardCases:
    """The cases of one batch size."""

    def __init__(self, setting: Setting, size: int, checkout: str | None) -> None:
        self.setting, self.device = setting, setting.device
        if checkout:
            os.environ[official.VARIABLE] = checkout
        torch.backends.cudnn.allow_tf32 = False  # the models compute in bfloat16; this is for checks in float32
        # Several calls in a row, as a sampler makes them: the host may run ahead of the device.
        self.chain = 1 if setting.rehearsal else max(1, min(8, 64 // size))
        self.dynamic = sides.create_dynamic(setting).to(setting.dtype).eval()
        self.batch = sides.create_batch(self.dynamic, size)
        sides.calibrate(self.dynamic, self.batch)
        with torch.no_grad():
            _, routing = self.dynamic(*self.batch, return_routing=True)
        self.shares: list[float] = routing.natural_mask.float().mean(1).tolist()
        static = sides.create_static(setting).to(setting.dtype).eval()
        self.static_flops = count_flops(static.config, batch=size)["total"]
        self.attention_ms = choose_sdpa(static.config, size, self.device, setting.dtype)
        with torch.no_grad():
            self.forms = self._static_forms(static)
            quick = self._time(self.forms, setting.seconds / 4)
        self.fastest = {
            STATIC: _fastest(quick, [name for name in self.forms if not name.endswith("graph")]),
            STATIC_GRAPH: _fastest(quick, [name for name in self.forms if name.endswith("graph")]),
        }

    @torch.no_grad()  # as a sampler calls the model
    def run(self, case: str) -> Mapping[str, Any]:
        if case == "equal":
            return self._equal()
        if case == "static":
            ms = times(self._time(self.forms, 2 * self.setting.seconds))
            return {"ms": ms, "fastest": self.fastest, "attention_ms": self.attention_ms}
        if case.startswith("kernels of "):
            return self._kernels(case.removeprefix("kernels of "))
        drop, mode = case.removeprefix("drop ").split(", ", maxsplit=1)
        return self._compare(float(drop), mode)

    def _static_forms(self, static: Any) -> dict[str, Forward]:
        """The forms in which the static model may be fastest. They must agree."""
        backend = self.setting.compiler
        pieces = CompiledDiT(static, backend)
        made: dict[str, Any] = {"plain": static, "compiled": pieces}
        expected = static(*self.batch)
        forms: dict[str, Forward] = {}
        for name, model in made.items():
            check_equal(f"static, {name}", [model(*self.batch)], [expected], TOLERANCE[self.setting.dtype])
            graphed = _Graphed(model, self.batch, self.device)
            check_equal(f"static, {name} graph", [graphed(*self.batch)], [expected], TOLERANCE[self.setting.dtype])
            forms[name] = partial(model, *self.batch)
            forms[f"{name} graph"] = partial(graphed, *self.batch)
        return forms

    def _equal(self) -> Mapping[str, Any]:
        """The DC-DiT computes what the plain definitions say: the same tokens kept, the same output, in every mode.

        In float32: rounding to 16 bits would decide about many tokens at the cut. Tests compare the kernels in 16 bits.
        """
        model = copy.deepcopy(self.dynamic).float()
        few = self._few()
        positions = len(model.pos_embed)
        modes: tuple[dict[str, Any], ...] = (
            {},
            {"drop_fraction": 0.4},
            {"budget": positions // 8},
            {"capacity": len(few[0]) * positions // 2, "drop_fraction": 0.2},
        )
        off, compared = {}, {}
        tolerance = TOLERANCE[torch.float32]
        for options in modes:
            name = ", ".join(f"{option} {value}" for option, value in options.items()) or "exact"
            out, routing = model(*few, **options, return_routing=True)
            with ops.use_backend("reference"):
                expected, right = model(*few, **options, return_routing=True)
            what = f"kept tokens, {name}"
            same = check_kept(what, routing.prob, routing.mask, right.prob, right.mask, tolerance)
            check_equal(f"output, {name}", [out[same]], [expected[same]], tolerance)
            off[name] = float((out[same].double() - expected[same].double()).norm() / expected[same].double().norm())
            compared[name] = int(same.sum())
        return {"off": off, "images compared": compared, "of images": len(few[0])}

    def _few(self) -> sides.Batch:
        """The images of a check, in float32. There are several, also where a single one is timed."""
        return sides.create_batch(self.dynamic, CHECKED_IMAGES)

    def _compare(self, rho: float, mode: str) -> Mapping[str, Any]:
        expected, routing = self.dynamic(*self.batch, drop_fraction=rho, return_routing=True)
        lengths = routing.selection.lengths.tolist()
        forward, lengths, found = self._dynamic_side(rho, mode, lengths)
        if found.pop("comparable"):
            check_equal(mode, [_first(forward())], [expected], TOLERANCE[expected.dtype])
        calls = {**{side: self.forms[form] for side, form in self.fastest.items()}, mode: forward}
        rounds = self._time(calls, self.setting.seconds)
        flops = count_flops(self.dynamic.config, lengths)["total"]
        factor = flops / self.static_flops
        return {
            **found,
            "ms": times(rounds),
            "eta": {side: interval(rounds.ratio(side, mode).scaled(factor)) for side in self.fastest},
            "static forms": self.fastest,
            "flops": flops,
            "static_flops": self.static_flops,
            "images": len(lengths),
            "kept": sum(lengths) / routing.mask.numel(),
            "warnings": warnings(rounds, [(side, mode) for side in self.fastest]),
        }

    def _dynamic_side(self, rho: float, mode: str, lengths: list[int]) -> tuple[Forward, list[int], dict[str, Any]]:
        """The call of a mode, the tokens that it keeps of each image, and what else there is to say."""
        batch, size = self.batch, len(self.batch[0])
        if mode == "official":
            if (reason := official.reason_unavailable()) is not None:
                raise LeftOut(reason)
            x, t, y = self._few()
            module = official.build_verified(self.dynamic, x.to(batch[0].dtype), t, y, rho)
            return partial(module, *batch, tail_dropping_fraction=rho), lengths, {"comparable": False}
        if mode == "exact":
            forward = partial(self.dynamic, *batch, drop_fraction=rho)
            stages = time_stages(forward, self.device, 5)
            return forward, lengths, {"stage_ms": stages.ms, "stage_spread": stages.spread, "comparable": True}
        how, shape = mode.split(", ")
        if shape == "exact":
            options, fixed, comparable = {"drop_fraction": rho}, {}, True
        elif shape == "budget":
            budget = max(1, sum(lengths) // size)
            options, fixed, comparable = {}, {"budget": budget}, False
            lengths = [budget] * size
        else:
            options, fixed, comparable = {"drop_fraction": rho}, self._static_sizes(rho), True
        eager = partial(self.dynamic, *batch, **options, **fixed)
        if how == "eager":
            return eager, lengths, {**fixed, "comparable": comparable}
        graphed = _graphed_denoiser(self.dynamic, size, self.device, **fixed)
        check_equal(f"{mode} against no graph", [graphed(*batch, **options)], [eager()], TOLERANCE[self.setting.dtype])
        return partial(graphed, *batch, **options), lengths, {**fixed, "comparable": comparable}

    def _static_sizes(self, rho: float) -> dict[str, int]:
        """Capacity and max_seqlen for this batch, as :func:`dcdit.models.plan_capacity` gives them."""
        size, mean = len(self.batch[0]), sum(self.shares) / len(self.shares)
        share = KeptShare(mean, MARGIN * mean * math.sqrt(size), max(self.shares), images=10**6)
        multiprocessors = multiprocessors_of(self.device)
        plan = plan_capacity(self.dynamic.config, size, share, rho, multiprocessors=multiprocessors, sigmas=1.0)
        return {"capacity": plan.capacity, "max_seqlen": plan.max_seqlen}

    def _time(self, calls: Mapping[str, Forward], seconds: float) -> Rounds:
        """Milliseconds of one call, each measured as a few in a row."""

        def chained(call: Forward) -> None:
            for _ in range(self.chain):
                call()

        rounds = time_rounds({name: partial(chained, call) for name, call in calls.items()}, self.device, seconds)
        for name, passes in rounds.passes.items():
            rounds.passes[name] = [{WHOLE: measured[WHOLE] / self.chain} for measured in passes]
        return rounds

    def _kernels(self, side: str) -> Mapping[str, Any]:
        """Where the time goes, kernel by kernel, as the profiler of PyTorch sees it."""
        if side == "static":
            call = self.forms[self.fastest[STATIC]]
        else:
            call = partial(self.dynamic, *self.batch)
        activity = torch.profiler.ProfilerActivity
        calls = 3
        wanted = [activity.CPU] if self.setting.rehearsal else [activity.CUDA]
        call()
        with torch.profiler.profile(activities=wanted) as profile:
            for _ in range(calls):
                call()
            if not self.setting.rehearsal:
                torch.cuda.synchronize()
        rows = [
            {
                "kernel": event.key[:120],
                "launches": event.count / calls,
                "us": (event.self_cpu_time_total if self.setting.rehearsal else event.self_device_time_total) / calls,
            }
            for event in profile.key_averages()
        ]
        rows = sorted((row for row in rows if row["us"] > 0), key=lambda row: -row["us"])
        return {
            "kernels": rows[:50],
            "launches": sum(row["launches"] for row in rows),
            "us": sum(row["us"] for row in rows),
        }


class _Graphed:
    """A forward in a CUDA graph, with the copies that using it takes, as :class:`GraphedDenoiser` has them."""

    def __init__(self, model: Callable[..., Tensor], batch: sides.Batch, device: torch.device) -> None:
        self.inputs = [tensor.clone() for tensor in batch]
        self.captured = CapturedCalls([partial(model, *self.inputs)], device)
        self.model = model

    def __call__(self, *batch: Tensor) -> Tensor:
        for held, given in zip(self.inputs, batch, strict=True):
            held.copy_(given)
        if not self.captured.held:  # no GPU
            return self.model(*self.inputs)
        self.captured()
        return self.captured.held[0].clone()


def _graphed_denoiser(model: Any, size: int, device: torch.device, **fixed: int) -> Callable[..., Tensor]:
    if not cuda.has_graphs(device):  # a rehearsal
        return partial(model, **fixed)
    if not fixed:
        return ExactGraphedDenoiser(model)
    return GraphedDenoiser(model, size, **fixed)


def _fastest(rounds: Rounds, names: list[str]) -> str:
    return min(names, key=lambda name: median(rounds.times(name)))


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def create(group: str, setting: Setting, lines: Lines, arguments: argparse.Namespace) -> ForwardCases:
    return ForwardCases(setting, setting.batches["small" in group], arguments.official)
