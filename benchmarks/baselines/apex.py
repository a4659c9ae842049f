"""Group norm with SiLU of apex (``apex.contrib.group_norm``) on channels-last images, where it is installed.

It has kernels for some numbers of channels only, and calls PyTorch's group norm for others. It adds no shift, so the
shift is added first.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from dcdit.profiling.workloads import Call


def reason_unavailable(device: torch.device) -> str | None:
    """Why this baseline cannot run here; None where it can."""
    if importlib.util.find_spec("apex") is None:
        return "apex is not installed"
    if device.type != "cuda":
        return "apex's group norm needs a CUDA device"
    return None


def create_call(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Call:
    """The call to time, on the arguments of the timed cases of :func:`dcdit.ops.group_norm_silu`."""
    group_norm: Any = importlib.import_module("apex.contrib.group_norm").GroupNorm
    norm = group_norm(num_groups, x.shape[2], eps=1e-5, act="silu", device=x.device, dtype=x.dtype)

    def call() -> Tensor:
        image = x.mT.unsqueeze(2)
        image = image if shift is None else image + shift[:, :, None, None]
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, image).squeeze(2).mT

    return call
