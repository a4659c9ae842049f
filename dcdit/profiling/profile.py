"""Does the compression of a DC-DiT become time? FLOPs and wall-clock against the static DiT.

The conversion eta is (time static / time dynamic) / (FLOPs static / FLOPs dynamic), with all variants timed in the same
run and with the same dtype. eta = 1 means that every saved FLOP became time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from dcdit.models import DCDiT, DCDiTConfig, DiT, DiTConfig, count_flops
from dcdit.nn import STAGES
from dcdit.nn.stages import collect_stages
from dcdit.ops.attention_kernels import attention_backends
from dcdit.profiling.timing import Call, time_stages, time_variants
from dcdit.utils.environment import device_name
from dcdit.utils.files import atomically
from dcdit.utils.tables import markdown_table

STATIC_PATCHES = (1, 2)


@dataclass
class Variant:
    """One model at one budget, as part of a comparison."""

    name: str
    drop_fraction: float | None
    """None for a static model."""
    kept_fraction: float | None
    """Of the positions; None for a static model."""
    gflops: float
    """Per image and forward, 2 x multiply-adds."""
    ms: float
    """Median per forward of the whole batch."""
    images_per_second: float
    eta: dict[str, float]
    """Conversion against each static model."""
    stage_ms: dict[str, float]
    stage_gflops: dict[str, float]


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
    channels_last: bool
    """Whether the convolution weights of the dynamic model lie channels-last."""
    variants: list[Variant]

    def table(self) -> str:
        """The comparison as a Markdown table."""
        statics = [variant.name for variant in self.variants if variant.drop_fraction is None]
        head = ["model", "drop", "kept", "GFLOPs/image", "ms/forward", "images/s"]
        head += [f"eta vs {name}" for name in statics]
        rows = [
            [
                variant.name,
                "" if variant.drop_fraction is None else f"{variant.drop_fraction:g}",
                "" if variant.kept_fraction is None else f"{variant.kept_fraction:.0%}",
                f"{variant.gflops:.2f}",
                f"{variant.ms:.1f}",
                f"{variant.images_per_second:.1f}",
                *(f"{variant.eta[name]:.2f}" if variant.eta else "" for name in statics),
            ]
            for variant in self.variants
        ]
        return markdown_table(head, rows)

    def stage_table(self) -> str:
        """Milliseconds and GFLOPs of each stage of the dynamic variants as a Markdown table."""
        dynamic = [variant for variant in self.variants if variant.stage_ms]
        head = ["stage", *(f"{unit}, drop {v.drop_fraction:g}" for v in dynamic for unit in ("ms", "GFLOPs"))]
        rows = [
            [stage]
            + [cell for v in dynamic for cell in (f"{v.stage_ms[stage]:.2f}", f"{v.stage_gflops.get(stage, 0.0):.2f}")]
            for stage in dynamic[0].stage_ms
        ]
        return markdown_table(head, rows)


def static_counterparts(config: DCDiTConfig) -> dict[str, DiTConfig]:
    """Static DiTs with the same transformer on the same input, at the patch sizes that divide the grid."""
    shared = {f.name for f in fields(DiTConfig)} & {f.name for f in fields(DCDiTConfig)}
    common = {name: getattr(config, name) for name in shared}
    return {
        f"static DiT, patch {patch}": DiTConfig(**common, patch_size=patch)
        for patch in STATIC_PATCHES
        if not any(side % patch for side in config.grid)
    }


@torch.inference_mode()
def profile(
    model: DCDiT,
    name: str,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    drop_fractions: Sequence[float] = (0.0, 0.3, 0.6),
    seconds: float = 2.0,
    compiled: bool = False,
) -> Profile:
    """Time a DC-DiT at several budgets against static DiTs of the same transformer, in one run.

    Args:
        model: in evaluation mode, on the device and in the dtype to measure.
        name: how to call it.
        x, t, y: a batch as the model takes it.
        drop_fractions: budgets to time.
        seconds: timing budget per variant.
        compiled: run the static models and the convolutions of the DC-DiT through ``torch.compile``.
    """
    device, batch = x.device, x.shape[0]
    dtype = model.x_embedder.weight.dtype
    statics = {
        label: DiT(config).to(device=device, dtype=dtype).eval()
        for label, config in static_counterparts(model.config).items()
    }
    if compiled:
        for part in (*statics.values(), model.encoder, model.router, model.decoder):
            part.compile()
    calls = {label: lambda static=static: static(x, t, y) for label, static in statics.items()}
    for rho in drop_fractions:
        calls[f"{name} {rho:g}"] = lambda rho=rho: model(x, t, y, drop_fraction=rho)
    times = time_variants(calls, device, seconds)

    def variant(label: str, key: str, flops: dict[str, int], rho: float | None, kept: float | None) -> Variant:
        return Variant(
            name=label,
            drop_fraction=rho,
            kept_fraction=kept,
            gflops=flops["total"] / batch / 1e9,
            ms=times[key],
            images_per_second=1e3 * batch / times[key],
            eta={},
            stage_ms={} if rho is None else time_stages(calls[key], device),
            stage_gflops={} if rho is None else {stage: flops[stage] / batch / 1e9 for stage in STAGES},
        )

    baselines = [variant(label, label, count_flops(s.config, batch=batch), None, None) for label, s in statics.items()]
    variants = list(baselines)
    for rho in drop_fractions:
        _, routing = model(x, t, y, drop_fraction=rho, return_routing=True)
        lengths = routing.selection.lengths.tolist()
        kept = sum(lengths) / routing.mask.numel()
        dynamic = variant(name, f"{name} {rho:g}", count_flops(model.config, lengths), rho, kept)
        dynamic.eta = {b.name: (b.ms / dynamic.ms) / (b.gflops / dynamic.gflops) for b in baselines}
        variants.append(dynamic)
    return Profile(
        model=name,
        device=device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        attention=next(label for label, available, _ in attention_backends(device) if available),
        compiled=compiled,
        channels_last=all(
            weight.is_contiguous(memory_format=torch.channels_last)
            for weight in model.parameters()
            if weight.dim() == 4
        ),
        variants=variants,
    )


def advice(result: Profile, low: float = 0.9) -> list[str]:
    """What to change if the lowest conversion is below ``low``; empty if it is not."""
    dynamic = [variant for variant in result.variants if variant.eta]
    worst = min(dynamic, key=lambda variant: min(variant.eta.values()))
    eta = min(worst.eta.values())
    if eta >= low:
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
    if on_gpu and result.batch < 8:
        hints.append(f"--batch above {result.batch}: launches take most of the time of a small batch.")
    if not result.channels_last:
        hints.append("convolution weights are not channels-last: model.to(memory_format=torch.channels_last).")
    per_flop = worst.stage_ms["transformer"] / worst.stage_gflops["transformer"]
    for stage, ms in worst.stage_ms.items():
        expected = per_flop * worst.stage_gflops.get(stage, 0.0)
        if stage != "whole" and ms - expected > 0.05 * worst.stage_ms["whole"]:
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
