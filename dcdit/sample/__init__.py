"""Sampling with a budget: drawing images, what a run costs, and the drop fraction that meets a target."""

from dcdit.sample.budget import CostTable, measure_costs
from dcdit.sample.model_calls import BoundaryMap, ModelCalls, tflops_per_image
from dcdit.sample.options import Guidance

__all__ = [
    "BoundaryMap",
    "CostTable",
    "Guidance",
    "ModelCalls",
    "measure_costs",
    "tflops_per_image",
]
