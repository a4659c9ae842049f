"""What caches of diffusers save on trained models, and what they cost: `python -m benchmarks.studies.caching`.

Each cache draws from the same noise as the sampler without one. The page tells which share of the steps was left out,
how far the images are from those without a cache (root mean square of the difference over that of the images), how far
those of fewer steps are that take the same time, and how much of the time and of the FLOPs it took.

The checkpoints are of two recipes of this package::

    dcdit train --config photographs-cpu --set run.minutes=10
    dcdit train --config photographs-cpu-static --set run.minutes=10
    python -m benchmarks.studies.caching runs/photographs-cpu runs/photographs-cpu-static

cache-dit (``pip install cache-dit``) stands beside them where it is installed.

Times are those of the processor, of one thread, because a busy machine changes them least. Every round goes through all
settings, there and back, and a time is compared with that without a cache in the same round.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import re
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.harness.machine import cpu_name
from dcdit.integrations.diffusers import DCDiTPipeline, TeaCacheConfig, fit_tea_cache
from dcdit.utils.tables import markdown_table

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""PyTorch's counter does not know that it computes anything."""


@dataclass
class Row:
    """One setting of one cache."""

    cache: str
    setting: str
    left_out: float
    """Share of the steps, of both branches, in which the transformer did not run."""
    error: float
    """Root mean square difference to the images without a cache, over their root mean square."""
    flops: float
    """Over those without a cache."""
    times: list[float]
    """The same of each round."""
    steps: int = 0
    """Without a cache, in the same time."""
    steps_error: float = 0.0
    """Error of the images that those give."""


@dataclass
class CacheDiT:
    """The first-block cache of the package cache-dit, which takes both branches of guidance in one call."""

    threshold: float

    def enable(self, pipe: DCDiTPipeline) -> None:
        import cache_dit

        blocks = cache_dit.BlockAdapter(
            pipe=pipe,
            transformer=pipe.transformer,
            blocks=pipe.transformer.blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
            check_prefixes=False,
        )
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, residual_diff_threshold=self.threshold, max_warmup_steps=1
        )
        cache_dit.enable_cache(blocks, cache_config=config)


def settings(pipe: DCDiTPipeline, draw: Callable[..., Tensor], num_steps: int) -> dict[tuple[str, str], Any]:
    """(cache, setting) to its configuration. What belongs to a checkpoint is measured on it."""
    record: list[tuple[float, float]] = []
    _with(pipe, TeaCacheConfig(record=record), draw)
    coefficients = fit_tea_cache(record, degree=2)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _with(pipe, MagCacheConfig(calibrate=True, num_inference_steps=num_steps), draw)
    # It prints the ratios of each branch; both branches get the mean.
    branches = [json.loads(found) for found in re.findall(r"^\[[^\]]+\]$", printed.getvalue(), re.MULTILINE)]
    ratios = [statistics.fmean(values) for values in zip(*branches, strict=True)]
    made: dict[tuple[str, str], Any] = {}
    for threshold in (0.05, 0.1, 0.2):
        made["FirstBlockCache", f"threshold {threshold}"] = FirstBlockCacheConfig(threshold)
    for threshold in (0.05, 0.1, 0.2):
        options = {"coefficients": coefficients, "num_inference_steps": num_steps}
        made["TeaCache", f"threshold {threshold}"] = TeaCacheConfig(threshold, **options)
    for threshold in (0.06, 0.24):
        options = {"mag_ratios": ratios, "num_inference_steps": num_steps}
        made["MagCache", f"threshold {threshold}"] = MagCacheConfig(threshold, **options)
    for interval in (2, 4):
        options = {"cache_interval": interval, "taylor_factors_dtype": torch.float32}
        made["TaylorSeer", f"every {interval} steps"] = TaylorSeerCacheConfig(**options)
    if importlib.util.find_spec("cache_dit") is not None:
        for threshold in (0.05, 0.1, 0.2):
            made["cache-dit", f"threshold {threshold}"] = CacheDiT(threshold)
    return made


def study(
    pipe: DCDiTPipeline,
    images: int,
    num_steps: int,
    rounds: int,
    scale: float,
    caches: Collection[str] | None = None,
) -> list[Row]:
    """All settings on one pipeline, or those of some caches."""
    labels = [number % pipe.transformer.config.num_classes for number in range(images)]
    noise = torch.Generator().manual_seed(0)
    shape = (images, pipe.transformer.config.in_channels, *pipe.transformer.config.grid)
    latents = torch.randn(shape, generator=noise)

    def draw(steps: int = num_steps) -> Tensor:
        return pipe(labels, scale, num_inference_steps=steps, latents=latents, output_type="latent").images

    draw(1)  # a first call is slow
    expected, full, all_calls = _counted(pipe, draw)
    configs = {
        (cache, setting): config
        for (cache, setting), config in settings(pipe, draw, num_steps).items()
        if caches is None or cache in caches
    }
    rows = []
    for (cache, setting), config in configs.items():
        drawn, flops, calls = _with(pipe, config, lambda: _counted(pipe, draw))
        # The caches of diffusers make a call of its own for each branch.
        branches = 2 if scale > 1 and not isinstance(config, CacheDiT) else 1
        left_out = 1 - calls / (all_calls * branches)
        rows.append(Row(cache, setting, left_out, _error(drawn, expected), flops / full, []))
    for number in range(rounds):
        plain = _seconds(draw)
        order = list(zip(rows, configs.values(), strict=True))
        for row, config in order if number % 2 == 0 else reversed(order):
            row.times.append(_with(pipe, config, lambda: _seconds(draw)) / plain)
    few: dict[int, float] = {}
    for row in rows:
        row.steps = max(1, round(num_steps * statistics.median(row.times)))
        if row.steps not in few:
            few[row.steps] = _error(draw(row.steps), expected)
        row.steps_error = few[row.steps]
    return rows


def _with(pipe: DCDiTPipeline, config: Any, run: Callable[[], Any]) -> Any:
    if isinstance(config, CacheDiT):
        import cache_dit

        config.enable(pipe)
        try:
            return run()
        finally:
            cache_dit.disable_cache(pipe)
    pipe.transformer.enable_cache(config)
    try:
        return run()
    finally:
        pipe.transformer.disable_cache()


def _counted(pipe: DCDiTPipeline, draw: Callable[[], Tensor]) -> tuple[Tensor, int, int]:
    """The images, their FLOPs, and how often the last block of the transformer ran."""
    calls: list[int] = []
    handle = pipe.transformer.to_dcdit().blocks[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    mapping = {ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        images = draw()
    handle.remove()
    return images, counter.get_total_flops(), len(calls)


def _seconds(draw: Callable[[], Tensor]) -> float:
    start = time.process_time()
    draw()
    return time.process_time() - start


def _error(images: Tensor, expected: Tensor) -> float:
    return float((images - expected).square().mean().sqrt() / expected.square().mean().sqrt())


# --- the page -----------------------------------------------------------------------------------------------------

HEAD = (
    "cache", "setting", "left out", "error", "error of fewer steps", "time", "FLOPs", "time saved / FLOPs saved",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        middle = statistics.median(row.times)
        saved = (1 - middle) / (1 - row.flops) if row.flops < 1 else float("nan")
        lines.append(
            [
                row.cache,
                row.setting,
                f"{row.left_out:.0%}",
                f"{row.error:.3f}",
                f"{row.steps_error:.3f} ({row.steps} steps)",
                f"{middle:.2f} ({min(row.times):.2f} to {max(row.times):.2f})",
                f"{row.flops:.2f}",
                f"{saved:.2f}" if saved == saved else "",
            ]
        )
    return markdown_table(list(HEAD), lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, help="runs, checkpoints or files")
    parser.add_argument("--out", type=Path, default=Path("out/caching"), help="folder of the page")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    parts = ["# What caches save", __doc__.split("\n\n")[1].replace("\n", " ")]
    parts.append(
        f"{args.images} images, {args.steps} steps, guidance {args.guidance_scale:g}, {args.rounds} rounds, float32, "
        f"one thread of {cpu_name()}. Times and FLOPs are shares of those without a cache: the median over the rounds, "
        "with the range in brackets. The coefficients of TeaCache and the ratios of MagCache were fitted on these runs."
    )
    found = {}
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.checkpoints:
        pipe = DCDiTPipeline.from_dcdit(path)
        pipe.set_progress_bar_config(disable=True)
        rows = study(pipe, args.images, args.steps, args.rounds, args.guidance_scale)
        scheduler, model = type(pipe.scheduler).__name__, pipe.transformer.to_dcdit()
        parts += [f"## {path.name}: {type(model).__name__}, {scheduler}", table(rows)]
        found[path.name] = [asdict(row) for row in rows]
        (args.out / "report.md").write_text("\n\n".join(parts) + "\n")
        (args.out / "study.json").write_text(json.dumps(found, indent=1) + "\n")
    print(args.out / "report.md")


if __name__ == "__main__":
    main()
