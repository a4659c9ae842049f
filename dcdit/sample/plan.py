"""From the budgets that were asked for to what each set of images drops."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from dcdit.checkpoint import Model
from dcdit.diffusion import parse_drop_schedule
from dcdit.diffusion.guidance import Fraction
from dcdit.models import DCDiT
from dcdit.sample.budget import CostTable, measure_costs, seconds_from_profile
from dcdit.sample.drawing import clips
from dcdit.sample.model_calls import call_times
from dcdit.sample.options import CostTarget, SamplingOptions
from dcdit.utils.environment import device_name

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""Precision of the weights to the dtype as a profile names it."""


@dataclass(frozen=True)
class Plan:
    """One set of images and how much it drops."""

    name: str
    """Stem of its files."""
    drop: Fraction | None
    """None leaves the option out."""
    summary: dict[str, Any]
    """Its budget as samples.json states it."""


def make_plans(options: SamplingOptions, model: Model, labels: Tensor | None = None) -> list[Plan]:
    """A plan for each budget. The drop fraction that meets a target is found by measuring.

    Args:
        labels: of the images to draw, on the model's device. Only a target needs them: a pilot run draws a batch.

    Raises:
        ValueError: a target that no drop fraction meets, a schedule or a profile that is not readable, or no labels for
            a target.
    """
    if not isinstance(model, DCDiT) or options.budget is not None:
        return [Plan("samples", None, {"drop_fraction": None})]
    if options.drop_schedules is not None:
        return [
            Plan(f"schedule_{text.replace(':', '_')}", parse_drop_schedule(text), {"drop_schedule": text})
            for text in options.drop_schedules
        ]
    if options.target is None:
        return [Plan(f"drop_{rho:g}", rho, {"drop_fraction": rho}) for rho in options.drop_fractions or (0.0,)]
    if labels is None:
        raise ValueError("a target needs labels; accepted: (N,) integer, as they will be drawn")
    table = _cost_table(options, options.target, model, labels)
    rho, cost = table.choose(options.target.cost)
    choice = {"target": options.target.cost, "expected": cost, **asdict(table)}
    return [Plan(f"drop_{rho:.3f}", rho, {"drop_fraction": rho, "target": choice})]


def _cost_table(options: SamplingOptions, target: CostTarget, model: DCDiT, labels: Tensor) -> CostTable:
    if target.profile is not None:
        times = call_times(options.method, options.steps)
        device, dtype = device_name(labels.device), DTYPES[options.precision]
        return seconds_from_profile(target.profile, times, options.guidance, device, dtype)
    tflops, seconds = measure_costs(
        model,
        labels[: options.batch_size],
        options.steps,
        options.method,
        options.guidance,
        seed=options.seed,
        clip=clips(model, options.method),
    )
    return tflops if target.unit == "TFLOPs" else seconds
