"""Fused operations for dynamic tokens: drop-in, differentiable, one meaning on every backend."""

from dcdit.ops.attention import varlen_attention
from dcdit.ops.backend import use_backend
from dcdit.ops.boundary import boundary_prob_cosine, boundary_prob_cosine2d, boundary_prob_predictability
from dcdit.ops.dechunk import dechunk_ema, dechunk_spatial
from dcdit.ops.loss import ratio_loss
from dcdit.ops.modulation import gated_add, gated_add_modulated_layer_norm, modulated_layer_norm
from dcdit.ops.packing import gather_tokens, scatter_tokens
from dcdit.ops.selection import select_tokens
from dcdit.ops.token_selection import TokenSelection

__all__ = [
    "TokenSelection",
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
    "use_backend",
    "varlen_attention",
]
