"""Triton backend: kernel launchers behind autograd and torch.library, for GPU tensors (CPU: in the interpreter)."""

from dcdit.ops._triton.modulation import gated_add, gated_add_modulated_layer_norm, modulated_layer_norm
from dcdit.ops._triton.packing import gather_tokens, scatter_tokens
from dcdit.ops._triton.selection import select_tokens

__all__ = [
    "gated_add",
    "gated_add_modulated_layer_norm",
    "gather_tokens",
    "modulated_layer_norm",
    "scatter_tokens",
    "select_tokens",
]
