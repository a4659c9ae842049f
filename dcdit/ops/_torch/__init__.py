"""The vectorised PyTorch backend: every operation, on any device, at a cost linear in the number of positions."""

from dcdit.ops.operations import collect_operations

globals().update(collect_operations(__name__, __path__))
