"""The optimiser of a run, and its step with clipped gradients."""

import torch
from torch import Tensor, nn

from dcdit.train.sharding import whole
from dcdit.utils.cuda import has_graphs


def create_optimizer(model: nn.Module, lr: float, weight_decay: float, device: torch.device) -> torch.optim.AdamW:
    """AdamW over all parameters; on a GPU PyTorch's fused kernels, one pass over weights, gradients and moments."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=has_graphs(device))


def clipped_step(optimizer: torch.optim.AdamW, max_norm: float) -> Tensor:
    """Clip the gradients to ``max_norm``, as ``torch.nn.utils.clip_grad_norm_`` does, and take a step.

    Fused kernels clip on the way: they divide each gradient by ``grad_scale`` and write it back, so no pass of its own
    reads and writes the gradients. Where the norm is at most ``max_norm`` the result is the same to the bit; elsewhere
    gradients may differ in their last bits, because they are divided and not multiplied by the inverse.

    Returns:
        () float32, the norm of all gradients before clipping. Every process gets that of the whole model.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not optimizer.defaults["fused"]:
        norm = whole(nn.utils.clip_grad_norm_(parameters, max_norm))
        optimizer.step()
        return norm
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients))
    # The same epsilon as in clip_grad_norm_. A norm that is not finite spoils the weights in both ways.
    optimizer.grad_scale = ((norm.float() + 1e-6) / max_norm).clamp(min=1.0)  # type: ignore[attr-defined]
    optimizer.step()
    return norm
