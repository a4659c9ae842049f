"""How good images are: FID, sFID, KID, Inception Score, precision, recall, and the FLOPs that they took."""

from dcdit.evaluate.extractors import TorchScriptInception, load_extractor
from dcdit.evaluate.features import Features, Statistics, extract
from dcdit.evaluate.measure import Evaluation, Figure, Reference, evaluate_images, load_reference

__all__ = [
    "Evaluation",
    "Features",
    "Figure",
    "Reference",
    "Statistics",
    "TorchScriptInception",
    "evaluate_images",
    "extract",
    "load_extractor",
    "load_reference",
]
