"""Does the compression of a DC-DiT become time? FLOPs and wall-clock against the static DiT.

The conversion eta is (time static / time dynamic) / (FLOPs static / FLOPs dynamic), all sides timed in the same run
with the same dtype: eta = 1 means that every saved FLOP became time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.models import DCDiT, DCDiTConfig, DiT, DiTConfig, count_flops
from dcdit.nn import STAGES
from dcdit.nn.routers import PredictabilityRouter
from dcdit.ops.attention_kernels import attention_backends
from dcdit.profiling.timing import time_sides, time_stages
from dcdit.utils.tables import markdown_table

STATIC_PATCHES = (1, 2)


@dataclass
class Side:
    """One model at one budget."""

    name: str
    drop_fraction: float | None
    """None for a static model."""
    kept_share: float | None
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
    sides: list[Side]

    def table(self) -> str:
        """The comparison as a Markdown table."""
        statics = [side.name for side in self.sides if side.drop_fraction is None]
        head = ["model", "drop", "kept", "GFLOPs/image", "ms/forward", "images/s"]
        head += [f"eta vs {name}" for name in statics]
        rows = [
            [
                side.name,
                "" if side.drop_fraction is None else f"{side.drop_fraction:g}",
                "" if side.kept_share is None else f"{side.kept_share:.0%}",
                f"{side.gflops:.2f}",
                f"{side.ms:.1f}",
                f"{side.images_per_second:.1f}",
                *(f"{side.eta[name]:.2f}" if side.eta else "" for name in statics),
            ]
            for side in self.sides
        ]
        return markdown_table(head, rows)

    def stage_table(self) -> str:
        """Milliseconds and GFLOPs of each stage of the dynamic sides as a Markdown table."""
        dynamic = [side for side in self.sides if side.stage_ms]
        head = ["stage", *(f"{unit}, drop {side.drop_fraction:g}" for side in dynamic for unit in ("ms", "GFLOPs"))]
        rows = [
            [stage]
            + [cell for s in dynamic for cell in (f"{s.stage_ms[stage]:.2f}", f"{s.stage_gflops.get(stage, 0.0):.2f}")]
            for stage in dynamic[0].stage_ms
        ]
        return markdown_table(head, rows)


def varied_latents(batch: int, channels: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """(B, C, H, W) noise whose smoothness differs between images, so that a router keeps different shares of them."""
    generator = torch.Generator().manual_seed(seed)
    coarse_grid = (max(2, grid[0] // 8), max(2, grid[1] // 8))
    coarse = torch.randn(batch, channels, *coarse_grid, generator=generator)
    smooth = F.interpolate(coarse, grid, mode="bicubic", align_corners=False)
    rough = torch.randn(batch, channels, *grid, generator=generator)
    amount = torch.linspace(0.1, 1.0, batch)[:, None, None, None]
    return (1 - amount) * smooth + amount * rough


@torch.no_grad()
def calibrate_router(model: DCDiT, x: Tensor, t: Tensor, y: Tensor, share: float) -> None:
    """Shift the output bias of an untrained router so that it naturally keeps this share of x.

    Raises:
        ValueError: the share is not between 0 and 1, or the router is not the predictability router (the only one with
            an output bias).
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; accepted: a number between 0 and 1")
    if not isinstance(model.router, PredictabilityRouter):
        raise ValueError(f"router is {model.config.router!r}; calibration accepts: predictability")
    _, routing = model(x, t, y, return_routing=True)
    logits = torch.logit(routing.prob[:, 1:-1].float(), eps=1e-6)  # the ends are forced
    bias = model.router.out.bias
    bias.copy_(bias - torch.quantile(logits.flatten()[: 2**24], 1 - share).to(bias.dtype))


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
        seconds: timing budget per side.
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
    works = {label: lambda static=static: static(x, t, y) for label, static in statics.items()}
    for rho in drop_fractions:
        works[f"{name} {rho:g}"] = lambda rho=rho: model(x, t, y, drop_fraction=rho)
    times = time_sides(works, device, seconds)

    def side(label: str, key: str, flops: dict[str, int], rho: float | None, share: float | None) -> Side:
        work = works[key]
        stages = {} if rho is None else time_stages(work, device)
        return Side(
            name=label,
            drop_fraction=rho,
            kept_share=share,
            gflops=flops["total"] / batch / 1e9,
            ms=times[key],
            images_per_second=1e3 * batch / times[key],
            eta={},
            stage_ms=stages,
            stage_gflops={} if rho is None else {stage: flops[stage] / batch / 1e9 for stage in STAGES},
        )

    baselines = [side(label, label, count_flops(s.config, batch=batch), None, None) for label, s in statics.items()]
    sides = list(baselines)
    for rho in drop_fractions:
        _, routing = model(x, t, y, drop_fraction=rho, return_routing=True)
        lengths = routing.selection.lengths.tolist()
        share = sum(lengths) / routing.mask.numel()
        dynamic = side(name, f"{name} {rho:g}", count_flops(model.config, lengths), rho, share)
        dynamic.eta = {b.name: (b.ms / dynamic.ms) / (b.gflops / dynamic.gflops) for b in baselines}
        sides.append(dynamic)
    return Profile(
        model=name,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
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
        sides=sides,
    )


def advice(result: Profile, low: float = 0.9) -> list[str]:
    """What to change where the conversion against the first static model is low; empty where nothing is to be said."""
    dynamic = [side for side in result.sides if side.eta]
    worst = min(dynamic, key=lambda side: min(side.eta.values()))
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
        hints.append("--compile: the static side and the convolutions gain from it.")
    if on_gpu and result.batch < 8:
        hints.append(f"--batch above {result.batch}: small batches are bound by launches, not by work.")
    if not result.channels_last:
        hints.append("convolution weights are not channels-last: model.to(memory_format=torch.channels_last).")
    per_flop = worst.stage_ms["transformer"] / worst.stage_gflops["transformer"]
    for stage, ms in worst.stage_ms.items():
        expected = per_flop * worst.stage_gflops.get(stage, 0.0)
        if stage != "whole" and ms - expected > 0.05 * worst.stage_ms["whole"]:
            hints.append(f"stage {stage!r} takes {ms:.1f} ms; at the transformer's speed per FLOP: {expected:.1f} ms.")
    return hints
