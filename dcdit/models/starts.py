"""How a DC-DiT starts, where its paper and its published code differ, and where neither learned best here."""

from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dcdit.models import init
from dcdit.nn import DitheredRouter, PredictabilityRouter
from dcdit.nn.identity import set_to_identity

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
    published code, with which it keeps fewer than one token in a hundred. So does the dithered router, which keeps a
    quarter with it."""


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
    _fill(residual_proj, start.residual, residual_proj.out_features)
    for linear in modulation.modules():
        if isinstance(linear, nn.Linear):
            # One Linear may hold the adaLN of all blocks; Xavier's bound is that of one block.
            _fill(linear, start.modulation, 6 * linear.in_features)
    if isinstance(router, PredictabilityRouter):
        if start.kept_share is None or isinstance(router, DitheredRouter):
            nn.init.constant_(router.out.bias, PredictabilityRouter.INITIAL_LOGIT)
        else:
            router.out.bias.copy_(_bias_for(start.kept_share, router.out.weight))


def _fill(linear: nn.Linear, how: Weight, fan_out: int) -> None:
    weight = linear.weight
    init.zero(weight, linear.bias)
    if how == "xavier":
        bound = (6 / (linear.in_features + fan_out)) ** 0.5
        nn.init.uniform_(weight, -bound, bound)
    elif how == "identity":
        set_to_identity(weight)


def _bias_for(share: float, weight: Tensor) -> Tensor:
    """The bias with which about ``share`` of the logits ``weight . SiLU(z) + bias`` are above 0."""
    return NormalDist().inv_cdf(share) * SILU_STD * weight.norm() - SILU_MEAN * weight.sum()
