"""Modules of dynamic-token diffusion transformers. Those for 1-D sequences are in :mod:`dcdit.nn.hnet`."""

from dcdit.nn import hnet
from dcdit.nn.chunk import ChunkLayer, ContextChunkLayer, EMADeChunk, SpatialDeChunk
from dcdit.nn.conv_block import ConvBlock, ConvStack
from dcdit.nn.dit_block import DenseDiTBlock, PackedDiTBlock, PendingResidual, VarlenMeta
from dcdit.nn.embedding import LabelEmbedder, SeparateTimestepEmbedders, TimestepEmbedder, sincos_position
from dcdit.nn.final_layer import DenseFinalLayer, PackedFinalLayer
from dcdit.nn.gates import Gates, TokenGate, WidthGates, Widths
from dcdit.nn.modulation import Modulation, SeparateModulation, StackedModulation
from dcdit.nn.norm import GroupNormSiLU, RMSNorm
from dcdit.nn.routers import (
    ROUTERS,
    Cosine1dRouter,
    Cosine2dRouter,
    DitheredRouter,
    PredictabilityRouter,
    UniformRouter,
)
from dcdit.nn.sparse_blocks import CrossDiTBlock, PooledDiTBlock
from dcdit.nn.sparse_tokens import PooledTokens, RoutedTokens
from dcdit.nn.stages import STAGES, collect_stages, stage
from dcdit.utils.deprecation import renamed_attributes

__getattr__ = renamed_attributes(
    __name__,
    {
        "DiTBlock": "PackedDiTBlock",
        "FinalLayer": "PackedFinalLayer",
        "Pending": "PendingResidual",
        "Sequences": "VarlenMeta",
    },
)

__all__ = [
    "ROUTERS",
    "STAGES",
    "ChunkLayer",
    "ContextChunkLayer",
    "ConvBlock",
    "ConvStack",
    "Cosine1dRouter",
    "Cosine2dRouter",
    "CrossDiTBlock",
    "DenseDiTBlock",
    "DenseFinalLayer",
    "DitheredRouter",
    "EMADeChunk",
    "Gates",
    "GroupNormSiLU",
    "LabelEmbedder",
    "Modulation",
    "PackedDiTBlock",
    "PackedFinalLayer",
    "PendingResidual",
    "PooledDiTBlock",
    "PooledTokens",
    "PredictabilityRouter",
    "RMSNorm",
    "RoutedTokens",
    "SeparateModulation",
    "SeparateTimestepEmbedders",
    "SpatialDeChunk",
    "StackedModulation",
    "TimestepEmbedder",
    "TokenGate",
    "UniformRouter",
    "VarlenMeta",
    "WidthGates",
    "Widths",
    "collect_stages",
    "hnet",
    "sincos_position",
    "stage",
]
