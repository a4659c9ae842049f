"""How good images are: FID, sFID, KID, Inception Score, precision, recall, and the FLOPs that they took."""

from dcdit.evaluate.extractors import TorchScriptInception, load_extractor
from dcdit.evaluate.features import Features, Statistics, extract_features
from dcdit.evaluate.measure import Evaluation, Metric, ReferenceSet, evaluate_images, load_reference
from dcdit.utils.deprecation import renamed_attributes

__all__ = [
    "Evaluation",
    "Features",
    "Metric",
    "ReferenceSet",
    "Statistics",
    "TorchScriptInception",
    "evaluate_images",
    "extract_features",
    "load_extractor",
    "load_reference",
]

__getattr__ = renamed_attributes(
    __name__, {"Figure": "Metric", "Reference": "ReferenceSet", "extract": "extract_features"}
)
