"""Triton backend: kernel launchers behind autograd and torch.library, for GPU tensors (CPU: in the interpreter)."""

from dcdit.ops._triton.boundary import (
    boundary_prob_cosine,
    boundary_prob_cosine2d,
    boundary_prob_predictability,
)
from dcdit.ops._triton.dechunk_ema import dechunk_ema
from dcdit.ops._triton.dechunk_spatial import dechunk_spatial
from dcdit.ops._triton.loss import ratio_loss
from dcdit.ops._triton.modulation import gated_add, gated_add_modulated_layer_norm, modulated_layer_norm
from dcdit.ops._triton.packing import gather_tokens, scatter_tokens
from dcdit.ops._triton.selection import select_tokens

__all__ = [
    "boundary_prob_cosine",
    "boundary_prob_cosine2d",
    "boundary_prob_predictability",
    "dechunk_ema",
    "dechunk_spatial",
    "gated_add",
    "gated_add_modulated_layer_norm",
    "gather_tokens",
    "modulated_layer_norm",
    "ratio_loss",
    "scatter_tokens",
    "select_tokens",
]
