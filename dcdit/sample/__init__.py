"""Sampling with a budget: drawing images, what a run costs, and the drop fraction that meets a target."""

from dcdit.sample.budget import CostTable, measure_costs
from dcdit.sample.kept_share import measure_kept_share
from dcdit.sample.model_calls import BoundaryMap, ModelCalls, tflops_per_image
from dcdit.sample.options import Guidance

__all__ = [
    "BoundaryMap",
    "CostTable",
    "Guidance",
    "ModelCalls",
    "measure_costs",
    "measure_kept_share",
    "tflops_per_image",
]
