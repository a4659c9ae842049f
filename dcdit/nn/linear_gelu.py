"""A linear layer and the tanh GELU behind it, in inference on a GPU as one product."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcdit.nn.plain import is_plain

DTYPES = (torch.float16, torch.bfloat16)


def linear_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """``gelu(linear(x))`` with DiT's tanh approximation, (..., in) -> (..., out).

    Without gradients, on CUDA tensors in half precision, a linear layer that does nothing else
    (:mod:`dcdit.nn.plain`) is one call of cuBLASLt. It applies the GELU to what the product has accumulated, before
    that is rounded, and saves a pass over the hidden activations. ``torch.compile`` keeps the call and has no such
    fusion of its own. PyTorch has no derivative of it, and on a CPU it computes another GELU (by erf). Under autocast
    the weights would be converted in every call. float32 is left as it is, so that it is never less exact.
    """
    if is_plain(linear, nn.Linear) and _may_fuse(linear, x):
        hidden = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
        return hidden.view(*x.shape[:-1], hidden.shape[-1])
    return F.gelu(linear(x), approximate="tanh")


def _may_fuse(linear: nn.Linear, x: Tensor) -> bool:
    return (
        _is_on_cuda(x)
        and x.dtype in DTYPES
        and x.dim() >= 2
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        # A subclass of Tensor may be quantised, or divided over processes.
        and type(linear.weight) is type(linear.bias) is nn.Parameter
        and x.dtype == linear.weight.dtype == linear.bias.dtype
    )


def _is_on_cuda(x: Tensor) -> bool:
    """Tests replace it to see which layers would be fused."""
    return x.is_cuda
