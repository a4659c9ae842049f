"""Vectorised PyTorch backend: every operation at a cost linear in the number of positions, on any device."""

from dcdit.ops._torch.boundary import (
    boundary_prob_cosine,
    boundary_prob_cosine2d,
    boundary_prob_predictability,
)
from dcdit.ops._torch.dechunk_ema import dechunk_ema
from dcdit.ops._torch.dechunk_spatial import dechunk_spatial
from dcdit.ops._torch.loss import ratio_loss
from dcdit.ops._torch.modulation import gated_add, gated_add_modulated_layer_norm, modulated_layer_norm
from dcdit.ops._torch.packing import gather_tokens, scatter_tokens
from dcdit.ops._torch.selection import select_tokens

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
