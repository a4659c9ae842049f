"""The layers that condition all models: embedders of the timestep and the class, and the adaLN of the blocks."""

from torch import nn

from dcdit.models.config import ModelConfig
from dcdit.nn import (
    LabelEmbedder,
    SeparateModulation,
    SeparateTimestepEmbedders,
    StackedModulation,
    TimestepEmbedder,
)


def create_embedders(config: ModelConfig) -> tuple[nn.Module, LabelEmbedder]:
    """Of the timestep and of the label. The sum of what they return is the conditioning.

    It is (B, D), or (depth, B, D) with ``separate_embedders``.
    """
    dim, labels = config.hidden_size, (config.num_classes, config.hidden_size, config.class_dropout_prob)
    if config.separate_embedders:
        timesteps = SeparateTimestepEmbedders(config.depth, dim, config.frequency_shift)
        return timesteps, LabelEmbedder(*labels, config.depth)
    return TimestepEmbedder(dim, config.frequency_shift), LabelEmbedder(*labels)


def create_modulation(config: ModelConfig) -> nn.Module:
    """The adaLN of all blocks, for the conditioning of :func:`create_embedders`."""
    kind = SeparateModulation if config.separate_embedders else StackedModulation
    return kind(config.hidden_size, config.depth)
