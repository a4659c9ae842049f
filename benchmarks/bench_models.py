"""Whole models: DC-DiT at several budgets against the static DiT of the same transformer, inference and training step.

A training step is that of the recipe: float32 weights, autocast on a GPU, clipping, averaged weights. A GPU is better
served by benchmarks/gpu_report.py, which also times CUDA graphs; without them small batches wait for Python.

The router of an untrained model is calibrated: its output bias is shifted until it keeps a quarter of the positions.
The roughness of the latents differs from image to image, and so does the kept fraction. The reference implementation
is one of the variants where DCDIT_OFFICIAL names its checkout.
"""

import functools
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.baselines import official
from benchmarks.bench_ops import TimedCall, time_variant
from benchmarks.harness import sets
from benchmarks.harness.counting import count_work
from benchmarks.harness.equality import TOLERANCE, check_equal
from benchmarks.harness.recipe_step import RecipeStep
from benchmarks.harness.static import CompiledDiT
from dcdit import ops
from dcdit.models import DCDiT, DiT, count_flops, create_model
from dcdit.nn.memory_format import channels_last
from dcdit.profiling.calibrate import calibrate_router, varied_latents
from dcdit.profiling.profile import static_counterparts
from dcdit.profiling.rounds import spread
from dcdit.profiling.timing import time_rounds, time_stages

KEEP = 0.25
DROPS = (0.0, 0.2, 0.4, 0.6)
VARIANTS = ("static patch 1", "static patch 2", *(f"drop {rho:g}" for rho in DROPS), "budget", "official drop 0.2")
SECONDS, LEAST_ROUNDS = (0.02, 3) if sets.chosen_set() == "tiny" else (3.0, 5)
"""More rounds than for an operation: a ratio of two times carries the noise of both."""


class Batch(NamedTuple):
    x: Tensor
    t: Tensor
    y: Tensor


class Group:
    """One size at one resolution and batch size: the dynamic model, its static counterparts, a batch."""

    def __init__(self, scale: str, size: int, batch: int, training: bool) -> None:
        device, dtype = sets.device(), torch.float32 if training else sets.dtype()
        torch.manual_seed(0)
        self.dynamic = _create(scale, size)
        official.randomize_zeros(self.dynamic)
        self.dynamic = self.dynamic.to(device=device, dtype=dtype).eval()
        self.batch = _batch(self.dynamic, batch)
        calibrate_router(self.dynamic, *self.batch, KEEP)
        if device.type == "cuda":  # every variant in its fastest form
            for part in (self.dynamic.encoder, self.dynamic.router, self.dynamic.decoder):
                part.compile()
        self.budget = max(1, int(KEEP * (1 - 0.2) * self.dynamic.pos_embed.shape[0]))
        configs = static_counterparts(self.dynamic.config).values()
        self.statics = {f"static patch {c.patch_size}": c for c in configs}

    def options(self, variant: str) -> dict[str, Any]:
        return {"budget": self.budget} if variant == "budget" else {"drop_fraction": float(variant.split()[-1])}

    @functools.lru_cache(maxsize=1)  # noqa: B019 (one group lives at a time)
    def variant(self, name: str) -> tuple[nn.Module, dict[str, Any], dict[str, int], float | None]:
        """The module of a variant, the options of its call, its FLOPs by stage and the fraction of tokens it keeps."""
        if name in self.statics:
            config = self.statics[name]
            static = DiT(config).to(device=self.batch.x.device, dtype=self.batch.x.dtype).eval()
            return static, {}, count_flops(config, batch=len(self.batch.x)), None
        options = self.options(name)
        with torch.no_grad():
            _, routing = self.dynamic(*self.batch, **options, return_routing=True)
        lengths = routing.selection.lengths.tolist()
        flops = count_flops(self.dynamic.config, lengths)
        kept = sum(lengths) / routing.mask.numel()
        if not name.startswith("official"):
            return self.dynamic, options, flops, kept
        module = official.build_verified(self.dynamic, *self.batch, options["drop_fraction"])
        return module, {"tail_dropping_fraction": options["drop_fraction"]}, flops, kept

    def check(self) -> None:
        """The dynamic model computes what the plain definitions say."""
        with torch.no_grad():
            out = self.dynamic(*self.batch, drop_fraction=0.2)
            with ops.use_backend("reference"):
                expected = self.dynamic(*self.batch, drop_fraction=0.2)
        check_equal("DC-DiT against the reference operations", [out], [expected], TOLERANCE[out.dtype])


@functools.lru_cache(maxsize=1)
def group_of(scale: str, size: int, batch: int, training: bool) -> Group:
    made = Group(scale, size, batch, training)
    made.check()
    return made


def _create(scale: str, size: int) -> DCDiT:
    tiny = {"depth": 2, "hidden_size": 128, "num_heads": 2} if scale == "tiny" else {}
    model = create_model("DC-DiT-S" if tiny else f"DC-DiT-{scale}", size, **tiny)
    assert isinstance(model, DCDiT)
    return channels_last(model)


def _batch(model: DCDiT, size: int) -> Batch:
    device, dtype = model.pos_embed.device, model.x_embedder.weight.dtype
    x = varied_latents(size, model.config.in_channels, model.config.grid).to(device, dtype)
    return Batch(x, torch.linspace(0, 999, size, device=device).long(), torch.arange(size, device=device))


def parameters() -> list[Any]:
    return [
        pytest.param(
            *run, variant, id=sets.case_id(run.scale, f"{run.size}px", f"b{run.batch}", run.direction, variant)
        )
        for run in sets.model_runs(sets.chosen_set())
        for variant in VARIANTS
    ]


@pytest.mark.parametrize(("scale", "size", "batch", "direction", "variant"), parameters())
def test_model(scale: str, size: int, batch: int, direction: str, variant: str, benchmark: Any, leave_out: Any) -> None:
    if variant.startswith("official") and (reason := official.reason_unavailable()):
        leave_out("official", reason)
    training = direction == "training"
    group = group_of(scale, size, batch, training)
    module, options, flops, kept = group.variant(variant)
    device = group.batch.x.device
    # Compiled in a few pieces: unrolling all blocks into one program takes minutes.
    net = CompiledDiT(module) if isinstance(module, DiT) and device.type == "cuda" else module
    step = recipe_step(module, net, group, options) if training else None
    call = inference(net, group.batch, options) if step is None else training_step(step, options)
    benchmark.group = f"{scale} {size}px batch {batch} {direction}"
    time_variant(benchmark, call, device, SECONDS, LEAST_ROUNDS)
    seconds = benchmark.stats.stats.median
    passes = 3 if training else 1
    dynamic = kept is not None and not variant.startswith("official")
    stages = time_stages(call, device, 3) if dynamic and direction == "inference" else None
    updates = time_update(step, device) if step else None
    benchmark.extra_info.update(
        kind="model", scale=scale, size=size, batch=batch, direction=direction, variant=variant, ms=1e3 * seconds,
        spread=spread(benchmark.stats.stats.data), images_per_s=batch / seconds,
        kept_fraction=kept, gflops=passes * flops["total"] / batch / 1e9,
        stage_gflops={stage: count / batch / 1e9 for stage, count in flops.items() if stage != "total"},
        stage_ms=stages and stages.ms, stage_spread=stages and stages.spread,
        optimizer_ms=updates and median(updates), optimizer_spread=updates and spread(updates),
        peak_bytes=peak_bytes(call, device),
    )  # fmt: skip


def inference(module: Callable[..., Any], batch: Batch, options: dict[str, Any]) -> TimedCall:
    def call() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (_first(module(*batch, **options)),)

    return call


def recipe_step(module: nn.Module, net: Callable[..., Any], group: Group, options: dict[str, Any]) -> RecipeStep:
    x, _, y = group.batch
    precision = "bf16" if x.is_cuda else "fp32"
    if "budget" in options:
        net = _WithBudget(module, **options)
    if isinstance(module, DCDiT | DiT):
        return RecipeStep(module, x, y, precision, net)
    return RecipeStep(module, x, y, precision, lambda *batch: _first(net(*batch, **options)), group.dynamic.config)


class _WithBudget:
    """A DC-DiT that keeps a fixed number of tokens, where a training step would have it drop some."""

    def __init__(self, module: nn.Module, budget: int) -> None:
        self.module, self.budget = module, budget

    def __call__(self, *batch: Tensor, drop_fraction: Tensor, **options: Any) -> Any:
        return self.module(*batch, budget=self.budget, **options)


def training_step(step: RecipeStep, options: dict[str, Any]) -> TimedCall:
    def call() -> tuple[Tensor, ...]:
        loss = step.backward(options.get("drop_fraction", 0.0))["loss"]
        step.update()
        return (loss.detach(),)

    return call


def time_update(step: RecipeStep, device: torch.device) -> list[float]:
    """Milliseconds by round. Clipping, optimizer and averages read every weight, whatever the number of tokens."""
    gradients = {p: torch.zeros_like(p) for p in step.model.parameters() if p.requires_grad}

    def update() -> None:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        step.update()

    return time_rounds({"update": update}, device, SECONDS / 3).times("update")


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def peak_bytes(call: TimedCall, device: torch.device) -> int:
    """The most memory that a call takes beyond what was in use before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with count_work() as work:
        call()
    return work.peak_bytes
