"""Checkpoints of other code bases, read and written without loss."""

from dcdit.models.convert.dit import load_dit, to_dit
from dcdit.models.convert.official import load_official, to_official

__all__ = ["load_dit", "load_official", "to_dit", "to_official"]
