"""Sampling with a budget: what a run costs, and the drop fraction that meets a target."""

from dcdit.sample.budget import CostTable, Guidance, measure_costs
from dcdit.sample.model_calls import ModelCalls, tflops_per_image

__all__ = [
    "CostTable",
    "Guidance",
    "ModelCalls",
    "measure_costs",
    "tflops_per_image",
]
