"""Counter-based noise, beside the same with one call of Philox for each element."""

import math

import torch
from torch import Tensor

from dcdit import ops
from dcdit.profiling.workloads.core import Arguments, Call, Case, Inputs, Operation


def _latents(inputs: Inputs) -> Arguments:
    device = inputs.shape.device
    return {
        "seed": torch.tensor(2**40 + 7, device=device),
        "images": torch.arange(3, 3 + inputs.shape.batch, device=device),
        "step": torch.tensor(5, device=device),
        "size": 4 * inputs.shape.length,
    }


def _plain(seed: Tensor, images: Tensor, step: Tensor, size: int) -> Call:
    element = torch.arange(size, device=images.device)
    counter, lane = element // 4, element % 4
    mask = 0xFFFFFFFF

    def call() -> Tensor:
        state = [counter + 0 * images[:, None], step + 0 * counter, images[:, None] & mask, images[:, None] >> 32]
        keys = [seed & mask, seed >> 32 & mask]
        for _ in range(10):
            a, b = state[0] * 0xD2511F53, state[2] * 0xCD9E8D57
            state = [(b >> 32 & mask) ^ state[1] ^ keys[0], b & mask, (a >> 32 & mask) ^ state[3] ^ keys[1], a & mask]
            keys = [(keys[0] + 0x9E3779B9) & mask, (keys[1] + 0xBB67AE85) & mask]
        first, second = torch.where(lane < 2, state[0], state[2]), torch.where(lane < 2, state[1], state[3])
        radius = (-2 * (first.float() * 2.0**-32 + 2.0**-33).double().log()).sqrt()
        angle = second.double() * (math.pi / 2**31)
        return (radius * torch.where(lane % 2 == 0, angle.cos(), angle.sin())).float()

    return call


OPERATIONS = (
    Operation(
        ops.philox_normal,
        plain=_plain,
        cases={"default": Case(_latents)},
        forward_reads=("images",),
        comparable=lambda normals: (normals,),
    ),
)
