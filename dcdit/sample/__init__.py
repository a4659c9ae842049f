"""Sampling with a budget: ``dcdit sample``, what a run costs, and the drop fraction that meets a target."""

from dcdit.sample.budget import CostTable, Guidance, measure_costs
from dcdit.sample.command import DEFAULT_METHOD, add_arguments, run
from dcdit.sample.model_calls import ModelCalls, tflops_per_image

__all__ = [
    "DEFAULT_METHOD",
    "CostTable",
    "Guidance",
    "ModelCalls",
    "add_arguments",
    "measure_costs",
    "run",
    "tflops_per_image",
]
