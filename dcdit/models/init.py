"""Initialisation shared by all models: DiT's (arXiv 2212.09748), as the DC-DiT reference uses it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dcdit.nn import LabelEmbedder, PackedFinalLayer


def reset_submodules(module: nn.Module) -> None:
    """Call ``reset_parameters`` of every submodule, in the order in which a constructor calls them.

    So it draws the same random numbers as the constructor.
    """
    for child in module.children():
        reset_submodules(child)
        reset = getattr(child, "reset_parameters", None)
        if callable(reset):
            reset()


def xavier(linears: Iterable[nn.Module]) -> None:
    """Xavier-uniform weights and zero biases for every Linear among the modules."""
    for module in linears:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            zero(module.bias)


def zero(*parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            nn.init.zeros_(parameter)


@torch.no_grad()
def init_patch_embed(conv: nn.Conv2d) -> None:
    """Xavier-uniform, with the convolution seen as a Linear on unfolded patches."""
    bound = (6 / (conv.weight[0].numel() + conv.out_channels)) ** 0.5
    # Numbers are drawn in the order of memory. So they are drawn in one memory format, whatever that of the weight is.
    drawn = torch.empty_like(conv.weight, memory_format=torch.contiguous_format)
    nn.init.uniform_(drawn, -bound, bound)  # returns nothing while diffusers loads a model, which skips it
    conv.weight.copy_(drawn)
    zero(conv.bias)


def init_embedders(t_embedder: nn.Module, y_embedder: LabelEmbedder) -> None:
    xavier(t_embedder.modules())
    for layer in t_embedder.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
    nn.init.normal_(y_embedder.table.weight, std=0.02)


def init_output(modulation: nn.Module, final_layer: PackedFinalLayer) -> None:
    """adaLN-Zero: every block starts as the identity, and the output as zero."""
    for layer in (*modulation.modules(), final_layer.modulation, final_layer.linear):
        if isinstance(layer, nn.Linear):
            zero(layer.weight, layer.bias)
