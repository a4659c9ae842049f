"""The Triton backend: kernel launchers behind autograd and torch.library, for GPU tensors (CPU: in the interpreter)."""

from dcdit.ops.operations import collect_operations

globals().update(collect_operations(__name__, __path__))
