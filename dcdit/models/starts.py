"""How a DC-DiT starts, where its paper and its published code differ, and where neither learned best here."""

from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dcdit.models import init
from dcdit.nn import PredictabilityRouter, SeparateModulation, StackedModulation

Weight = Literal["zero", "xavier", "identity"]

SILU_MEAN, SILU_STD = 0.2066, 0.5595
"""Of SiLU(z) for a z with mean 0 and standard deviation 1, as a group norm returns it."""


class Start(NamedTuple):
    """The first weights of the parts on which the sources do not agree."""

    residual: Weight
    """``residual_proj``, the way around the transformer."""
    modulation: Weight
    """adaLN of the blocks. At zero every block starts as the identity (DiT, arXiv 2212.09748)."""
    kept_share: float | None = None
    """Fraction of the tokens that the predictability router keeps at first, about. None takes the bias -1.1 of the
    published code, with which it keeps fewer than one token in a hundred."""


STARTS = {
    "paper": Start(residual="zero", modulation="zero"),
    "official": Start(residual="xavier", modulation="xavier"),
    "xavier": Start(residual="xavier", modulation="zero"),
    "identity": Start(residual="identity", modulation="zero"),
    "share": Start(residual="xavier", modulation="xavier", kept_share=0.25),
}


@torch.no_grad()
def apply_start(start: Start, residual_proj: nn.Linear, modulation: nn.Module, router: nn.Module) -> None:
    """Overwrite the first weights of the three parts. What is zero draws no random number."""
    _fill(residual_proj.weight, start.residual)
    init.zero(residual_proj.bias)
    for block in _of_each_block(modulation):
        _fill(block, start.modulation)
    if isinstance(router, PredictabilityRouter):
        bias = router.out.bias
        if start.kept_share is None:
            nn.init.constant_(bias, PredictabilityRouter.INITIAL_LOGIT)
        else:
            bias.copy_(_bias_for(start.kept_share, router.out.weight))


def _fill(weight: Tensor, how: Weight) -> None:
    if how == "zero":
        nn.init.zeros_(weight)
    elif how == "xavier":
        nn.init.xavier_uniform_(weight)
    else:
        # Not nn.init.eye_: that writes the whole identity into each shard of a sharded weight.
        weight.copy_(torch.ones_like(weight).tril().triu())


def _of_each_block(modulation: nn.Module) -> list[Tensor]:
    """The adaLN weights (6D, D) of each block: Xavier's bound depends on the shape."""
    if isinstance(modulation, StackedModulation):
        weight = modulation.linear.weight
        return list(weight.split(6 * weight.shape[1]))
    assert isinstance(modulation, SeparateModulation)
    return [linear.weight for linear in modulation.linears]


def _bias_for(share: float, weight: Tensor) -> Tensor:
    """The bias with which about ``share`` of the logits ``weight . SiLU(z) + bias`` are above 0."""
    return NormalDist().inv_cdf(share) * SILU_STD * weight.norm() - SILU_MEAN * weight.sum()
