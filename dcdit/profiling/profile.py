"""Do the saved FLOPs of a dynamic model become time? FLOPs and wall-clock against the static DiT.

The conversion eta is (time static / time dynamic) / (FLOPs static / FLOPs dynamic), with all variants timed in the same
run and with the same dtype. eta = 1 means that every saved FLOP became time. The variants run in turns, and the ratio
of times is the median of those of the single rounds, so that a machine that gets slower does not change it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import MappingProxyType

import torch
from torch import Tensor

from dcdit.graphs import ExactGraphedDenoiser, GraphedDenoiser
from dcdit.models import DCDiT, DiT, count_flops
from dcdit.nn import STAGES
from dcdit.nn.stages import collect_stages
from dcdit.ops.attention_kernels import attention_backends
from dcdit.profiling.reliability import NARROW, doubts, is_crowded, is_narrow
from dcdit.profiling.rounds import WHOLE, Rounds, spread
from dcdit.profiling.subject import DynamicModel, Subject, static_counterparts
from dcdit.profiling.timing import Call, time_rounds
from dcdit.utils.environment import device_name
from dcdit.utils.files import atomically
from dcdit.utils.tables import markdown_table

LEAST_ROUNDS = 9
"""From here on the interval of a median leaves one round out at either end."""
LOW_ETA = 0.9
"""Below this conversion it is worth looking for what is slow."""


@dataclass
class Variant:
    """One model at one budget, as part of a comparison."""

    name: str
    drop_fraction: float | None
    """None for a static model."""
    kept_fraction: float | None
    """Of the tokens: of a SparseDiT the sparse ones, of a DyDiT those in its MLPs. None for a static model."""
    gflops: float
    """Per image and forward, 2 x multiply-adds."""
    ms: float
    """Median per forward of the whole batch."""
    images_per_second: float
    eta: dict[str, float]
    """Conversion against each static model."""
    stage_ms: dict[str, float]
    """Medians, of the ``whole`` too. These passes are others than those of ``ms``, in the same rounds."""
    stage_gflops: dict[str, float]
    spread: float
    """Of ``ms``: half the interquartile range over the median."""
    stage_spread: dict[str, float]
    eta_interval: dict[str, tuple[float, float]]
    """Holds the true median of ``eta`` with a probability of at least 95 %, if the rounds differ by chance only."""


@dataclass
class Profile:
    """A comparison and the conditions it was made under."""

    model: str
    device: str
    dtype: str
    batch: int
    threads: int
    torch: str
    attention: str
    compiled: bool
    graph: bool
    """Whether the models were timed as CUDA graphs; the stages never are."""
    channels_last: bool
    """Whether the convolution weights of the dynamic model lie channels-last."""
    variants: list[Variant]
    rounds: int
    """Each variant was timed once per round."""
    narrow: bool
    """Whether the rounds ended because every eta was certain enough, and not because their time was used up."""
    waited: float | None
    """Fraction of the time that threads waited for a processor; None where the system does not tell."""
    reliable: bool
    """Whether eta can be relied on, see :mod:`dcdit.profiling.reliability`."""
    warnings: list[str]
    """What to know before reading the numbers. An unreliable profile begins with its reasons."""

    def caution(self) -> str:
        """The warnings as Markdown; empty if there are none."""
        if not self.warnings:
            return ""
        head = "UNRELIABLE: these timings do not say what eta is."
        if self.reliable:
            head = "This run cannot tell some of its times apart:"
        return "\n".join([head, "", *(f"- {warning}" for warning in self.warnings)])

    def conditions(self) -> str:
        """How long was measured, and under which load, in a sentence or two."""
        until = f"every eta was known to ±{NARROW:.0%}" if self.narrow else "the time for them was used up"
        load = "How long threads waited for a processor is not known on this system."
        if self.waited is not None:
            load = f"Threads waited for a processor {self.waited:.0%} of the time, because of other work."
        return f"{self.rounds} rounds in turns, until {until}. {load}"

    def table(self) -> str:
        """The comparison as a Markdown table."""
        statics = [variant.name for variant in self.variants if variant.drop_fraction is None]
        head = ["model", "drop", "kept", "GFLOPs/image", "ms/forward", "spread", "images/s"]
        head += [f"eta vs {name}" for name in statics]
        rows = [
            [
                variant.name,
                "" if variant.drop_fraction is None else f"{variant.drop_fraction:g}",
                "" if variant.kept_fraction is None else f"{variant.kept_fraction:.0%}",
                f"{variant.gflops:.2f}",
                f"{variant.ms:.1f}",
                f"±{variant.spread:.1%}",
                f"{variant.images_per_second:.1f}",
                *(self._eta(variant, name) if variant.eta else "" for name in statics),
            ]
            for variant in self.variants
        ]
        return markdown_table(head, rows)

    def _eta(self, variant: Variant, static: str) -> str:
        low, high = variant.eta_interval[static]
        value = f"{variant.eta[static]:.2f}" if self.reliable else "unreliable"
        return f"{value} ({low:.2f} to {high:.2f})"

    def stage_table(self) -> str:
        """Milliseconds with their spread and GFLOPs of each stage of the dynamic variants as a Markdown table."""
        dynamic = [variant for variant in self.variants if variant.stage_ms]
        head = ["stage", *(f"{unit}, drop {v.drop_fraction:g}" for v in dynamic for unit in ("ms", "spread", "GFLOPs"))]
        rows = []
        for stage in dynamic[0].stage_ms:
            rows.append([stage])
            for v in dynamic:
                gflops = v.gflops if stage == WHOLE else v.stage_gflops[stage]
                rows[-1] += [f"{v.stage_ms[stage]:.2f}", f"±{v.stage_spread[stage]:.1%}", f"{gflops:.2f}"]
        return markdown_table(head, rows)


@torch.inference_mode()
def profile(
    model: DynamicModel,
    name: str,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    drop_fractions: Sequence[float] = (0.0, 0.3, 0.6),
    seconds: float = 2.0,
    compiled: bool = False,
    graph: bool = False,
) -> Profile:
    """Time a dynamic model against static DiTs of the same transformer, in one run: a DC-DiT at several budgets.

    One of dynamic width runs with its slices (:class:`dcdit.models.SlicedModel`).

    Args:
        model: in evaluation mode, on the device and in the dtype to measure.
        name: how to call it.
        x, t, y: a batch as the model takes it. With dynamic width all of t is the same timestep.
        drop_fractions: budgets to time. A DyDiT and a SparseDiT drop no tokens, so they take only 0.
        seconds: timing budget per variant. Less is used if every eta is certain before. More is used if it is too short
            for ``LEAST_ROUNDS``, unless other work disturbs them anyway.
        compiled: run the static models and the convolutions of a DC-DiT through ``torch.compile``.
        graph: time CUDA graphs of all models, of a DC-DiT in exact mode. Only the stages are timed without.

    Raises:
        ValueError: graphs are asked for and cannot be (:func:`dcdit.graphs.graph_obstacle`), several timesteps for
            dynamic width, or a drop fraction for a model that drops no tokens.
    """
    device, batch = x.device, x.shape[0]
    dtype = model.x_embedder.weight.dtype
    statics = {
        label: DiT(config).to(device=device, dtype=dtype).eval()
        for label, config in static_counterparts(model.config).items()
    }
    subject = Subject(model, x, t, y)
    if compiled:
        convolutions = (model.encoder, model.router, model.decoder) if isinstance(model, DCDiT) else ()
        for part in (*statics.values(), *convolutions):
            part.compile()
    calls: dict[str, Call] = {label: partial(static, x, t, y) for label, static in statics.items()}
    dynamics = {rho: f"{name} at drop {rho:.12g}" for rho in drop_fractions}
    by_stage = {label: f"{label} with its stages timed" for label in dynamics.values()}
    for rho, label in dynamics.items():
        calls[label] = calls[by_stage[label]] = subject.call(rho)
    if graph:
        calls |= _graphs(model, statics, dynamics, (x, t, y))
    repeated = {} if graph else by_stage
    pairs = [(static, label) for static in statics for label in dynamics.values()]
    budget = seconds * (len(statics) + len(dynamics))

    def enough(rounds: Rounds) -> bool:
        if len(rounds) < LEAST_ROUNDS:
            return rounds.seconds > budget and is_crowded(rounds)
        return is_narrow(rounds, pairs) and not doubts(rounds, pairs, repeated)

    staged = by_stage.values()
    rounds = time_rounds(calls, device, budget, staged=staged, warmup=1, least=LEAST_ROUNDS, enough=enough)

    baselines = [
        _variant(label, batch, count_flops(static.config, batch=batch), rounds.times(label))
        for label, static in statics.items()
    ]
    variants = list(baselines)
    for rho, label in dynamics.items():
        flops, kept = subject.cost(rho)
        dynamic = _variant(name, batch, flops, rounds.times(label), rounds.stage_times(by_stage[label]), rho, kept)
        for static in baselines:
            eta = rounds.ratio(static.name, label).scaled(dynamic.gflops / static.gflops)
            dynamic.eta[static.name], dynamic.eta_interval[static.name] = eta.value, (eta.low, eta.high)
        variants.append(dynamic)
    reasons = doubts(rounds, pairs, repeated)
    return Profile(
        model=name,
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        attention=next(label for label, available, _ in attention_backends(device) if available),
        compiled=compiled,
        graph=graph,
        channels_last=all(
            weight.is_contiguous(memory_format=torch.channels_last)
            for weight in model.parameters()
            if weight.dim() == 4
        ),
        variants=variants,
        rounds=len(rounds),
        narrow=is_narrow(rounds, pairs) and not reasons,
        waited=rounds.waited,
        reliable=not reasons,
        warnings=reasons + _same_time(rounds, dynamics),
    )


def _graphs(
    model: DynamicModel, statics: dict[str, DiT], dynamics: dict[float, str], inputs: tuple[Tensor, Tensor, Tensor]
) -> dict[str, Call]:
    """The calls of all models as CUDA graphs, of a DC-DiT in exact mode."""
    batch = len(inputs[0])
    calls: dict[str, Call] = {
        name: partial(GraphedDenoiser(static, batch), *inputs) for name, static in statics.items()
    }
    if isinstance(model, DCDiT):
        exact = ExactGraphedDenoiser(model)
        return calls | {label: partial(exact, *inputs, drop_fraction=rho) for rho, label in dynamics.items()}
    return calls | {label: partial(GraphedDenoiser(model, batch), *inputs) for label in dynamics.values()}


def _variant(
    name: str,
    batch: int,
    flops: dict[str, int],
    times: Sequence[float],
    stage_times: Mapping[str, Sequence[float]] = MappingProxyType({}),
    drop_fraction: float | None = None,
    kept_fraction: float | None = None,
) -> Variant:
    """What was measured of one variant, still without eta. A static model has no stages and no fractions."""
    return Variant(
        name=name,
        drop_fraction=drop_fraction,
        kept_fraction=kept_fraction,
        gflops=flops["total"] / batch / 1e9,
        ms=median(times),
        images_per_second=1e3 * batch / median(times),
        eta={},
        stage_ms={stage: median(values) for stage, values in stage_times.items()},
        stage_gflops={stage: flops[stage] / batch / 1e9 for stage in STAGES} if stage_times else {},
        spread=spread(times),
        stage_spread={stage: spread(values) for stage, values in stage_times.items()},
        eta_interval={},
    )


def _same_time(rounds: Rounds, dynamics: dict[float, str]) -> list[str]:
    """Budgets next to each other whose times differ by less than what this run can tell."""
    found = []
    for less, more in pairwise(sorted(dynamics)):
        ratio = rounds.ratio(dynamics[more], dynamics[less])
        if ratio.low <= 1 <= ratio.high:
            found.append(
                f"drop {more:g} takes {ratio.low:.2f} to {ratio.high:.2f} times as long as drop {less:g}: "
                "the spread is larger than the difference"
            )
    return found


def advice(result: Profile) -> list[str]:
    """What to change if the lowest conversion is surely below 0.9; empty if it is not, or if noise explains it."""
    dynamic = [variant for variant in result.variants if variant.eta]
    worst = min(dynamic, key=lambda variant: min(variant.eta.values()))
    static, eta = min(worst.eta.items(), key=lambda item: item[1])
    if not result.reliable or worst.eta_interval[static][1] >= LOW_ETA:
        return []
    on_gpu = result.device != "cpu"
    hints = [f"eta is {eta:.2f} at drop {worst.drop_fraction:g}: part of the saved FLOPs did not become time."]
    if on_gpu and result.dtype == "float32":
        hints.append("--dtype bfloat16: tensor cores and the flash kernels need half precision.")
    if on_gpu and result.attention == "sdpa":
        hints.append(
            "attention runs on the sdpa fallback and waits for lengths on the host: pip install 'dcdit[flash]'."
        )
    if on_gpu and not result.compiled:
        hints.append("--compile: the static models and the convolutions gain from it.")
    if on_gpu and result.batch < 8 and not result.graph:
        hints.append(f"--graph, or --batch above {result.batch}: launches take most of the time of a small batch.")
    if not result.channels_last:
        hints.append("convolution weights are not channels-last: model.to(memory_format=torch.channels_last).")
    per_flop = worst.stage_ms["transformer"] / worst.stage_gflops["transformer"]
    for stage, ms in worst.stage_ms.items():
        expected = per_flop * worst.stage_gflops.get(stage, 0.0)
        surely = ms * (1 - worst.stage_spread[stage])
        if stage != WHOLE and surely - expected > 0.05 * worst.stage_ms[WHOLE]:
            hints.append(f"stage {stage!r} takes {ms:.1f} ms; at the transformer's speed per FLOP: {expected:.1f} ms.")
    return hints


def write_trace(forward: Call, path: str | Path) -> None:
    """Write a Chrome trace of one forward pass, with its stages by name."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    with torch.inference_mode(), profiler as recorded, collect_stages(torch.profiler.record_function):
        forward()
    atomically(Path(path), lambda file: recorded.export_chrome_trace(str(file)))
