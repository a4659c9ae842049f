"""Group norm and SiLU as two calls of PyTorch on a channels-last image, as conv blocks usually write it."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit import ops
from dcdit.profiling.workloads.core import Arguments, Call, Case, Inputs, Operation

GROUPS = 32


def _arguments(
    inputs: Inputs,
    wide: bool = False,
    shifted: bool = True,
    image: bool = False,
    parameter_dtype: torch.dtype | None = None,
) -> Arguments:
    """At a quarter of D, where most norms of an encoder and a decoder are, or at D, where the decoder's first is."""
    shape = inputs.shape
    # Three channels in a group, as in the smallest DC-DiT: of one, a norm would remove the shift.
    channels = max(shape.width // (1 if wide else 4) // GROUPS, 3) * GROUPS
    x = inputs.normal(shape.batch, shape.length, channels)
    if image:
        x = x.detach().unflatten(1, shape.grid).permute(0, 3, 1, 2).requires_grad_()
    arguments: Arguments = {
        "x": x,
        "num_groups": GROUPS,
        "weight": inputs.normal(channels, dtype=parameter_dtype),
        "bias": inputs.normal(channels, dtype=parameter_dtype),
    }
    if shifted:
        arguments["shift"] = inputs.normal(shape.batch, channels, dtype=parameter_dtype)
    return arguments


def _plain(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Call:
    def call() -> Tensor:
        image = x.mT.unsqueeze(2)  # channels-last, as a convolution leaves it
        if shift is not None:
            image = image + shift[:, :, None, None]
        return F.silu(F.group_norm(image, num_groups, weight, bias, 1e-5)).squeeze(2).mT

    return call


OPERATIONS = (
    Operation(
        ops.group_norm_silu,
        plain=_plain,
        cases={
            "default": Case(_arguments),
            "wide": Case(partial(_arguments, wide=True, shifted=False), timed=True),
            "image": Case(partial(_arguments, image=True)),
            "frozen": Case(_arguments, gradients=("x",)),
            "parameters_only": Case(_arguments, gradients=("weight", "bias", "shift")),
            "float32": Case(partial(_arguments, parameter_dtype=torch.float32)),
            "float32_frozen": Case(partial(_arguments, parameter_dtype=torch.float32), gradients=("x",)),
        },
        forward_reads=("x", "weight", "bias", "shift"),
        backward_reads=("x", "weight", "bias"),
        backward_writes=("x", "weight", "bias", "shift"),
    ),
)
