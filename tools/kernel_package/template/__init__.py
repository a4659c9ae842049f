"""Fused operations for dynamic tokens, and layers that call them."""

from . import layers, ops
from .ops import *  # noqa: F403

__all__ = [*ops.__all__, "layers"]
