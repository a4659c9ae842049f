"""When a model may be captured, and whether a graph still fits the model that it was captured from."""

import os
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from dcdit.models import DCDiT, SparseDiT
from dcdit.ops.attention_kernels import choose_attention_backend
from dcdit.utils.cuda import has_graphs


def graph_obstacle(
    model: object, budget: int | None = None, capacity: int | Literal["auto"] | None = None
) -> str | None:
    """Why forward passes of a model cannot be captured with these options; None if they can.

    They can if the model is a module in evaluation mode on a CUDA device, without hooks and without sharded weights
    (FSDP), if neither its width nor the sparse tokens of a SparseDiT follow the timestep, if every shape is static (a
    static model, or a budget or capacity), and if no operation waits for the device: not with ``DCDIT_CHECK=1``, nor
    with a capacity where attention has no kernel for packed sequences.

    Example:
        >>> from dcdit.graphs import graph_obstacle
        >>> from dcdit.models import create_model
        >>> model = create_model("DC-DiT-S", grid=(4, 4), hidden_size=128, depth=1, num_heads=2).eval()
        >>> graph_obstacle(model, budget=4)
        'the model is on cpu; CUDA graphs need a CUDA device'
    """
    if not isinstance(model, nn.Module):
        return f"{type(model).__name__} is no module, so nobody knows what it does besides launching kernels"
    weight = next(model.parameters(), None)
    device = torch.device("cpu") if weight is None else weight.device
    if not has_graphs(device):
        return f"the model is on {device}; CUDA graphs need a CUDA device"
    if model.training:
        return "the model is in training mode; call model.eval() first"
    if hasattr(model, "_orig_mod"):
        return "the model is compiled as a whole, and such a model may capture graphs of its own"
    if _has_hooks(model):
        return "a module has hooks, which a replay would not run"
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        return "the weights are sharded, and gathering them is no part of a graph"
    if reads := checks_obstacle():
        return reads
    if getattr(model, "width_gates", None) is not None:
        return "its width follows the timestep, and a graph has one width; accepted: a dcdit.models.SlicedModel"
    if isinstance(model, SparseDiT) and model.config.noisy_grid is not None:
        return "the number of its sparse tokens follows the timestep, which the host reads; accepted: no noisy_grid"
    if not isinstance(model, DCDiT):
        return None
    if budget is None and capacity is None:
        return "the number of kept tokens changes; accepted: a budget or a capacity, or an ExactGraphedDenoiser"
    if capacity is not None and waits_in_attention(model):
        return f"attention of {weight.dtype if weight is not None else None} reads lengths on the host"
    return None


def checks_obstacle() -> str | None:
    """Why nothing can be captured that checks values; None if they are not checked."""
    return "DCDIT_CHECK=1 reads values on the host" if os.environ.get("DCDIT_CHECK") == "1" else None


def waits_in_attention(model: DCDiT, dtype: torch.dtype | None = None) -> bool:
    """Whether attention over images of different lengths reads their lengths on the host.

    Args:
        dtype: of queries and keys; None: that of the weights.
    """
    weight = next(model.parameters())
    head_dim = model.config.hidden_size // model.config.num_heads
    dtype = weight.dtype if dtype is None else dtype
    return weight.is_cuda and choose_attention_backend("auto", weight.device, dtype, head_dim, False) == "sdpa"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """To which autocast converts now; None if it does not. A graph repeats what it was at the capture."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _has_hooks(model: nn.Module) -> bool:
    return torch_module._has_any_global_hook() or any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules()
    )


class FixedModel:
    """A model that must stay what it is. It keeps the model alive, and so the memory that a graph reads.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parts: list[tuple[str, dict[str, Any], str, Any, tuple[int, int] | None]] = []
        for path, module in model.named_modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                owner = module._parameters if name in module._parameters else module._buffers
                self._parts.append((f"{path}.{name}".lstrip("."), owner, name, tensor, _state(tensor)))
            for name, child in module._modules.items():
                self._parts.append((f"{path}.{name}".lstrip("."), module._modules, name, child, None))

    def check(self) -> None:
        """Raise ValueError if a weight or a module was replaced or changed, or the model is in training mode."""
        if self.model.training:
            raise ValueError("the model is in training mode, and its graph was captured in evaluation mode")
        for path, owner, name, part, state in self._parts:
            if owner.get(name) is not part or (state is not None and _state(part) != state):
                raise ValueError(f"{path} was replaced or changed after the graph was captured; make a new graph")


def _state(tensor: torch.Tensor | None) -> tuple[int, int] | None:
    """Changes when the tensor gets other memory or other values."""
    # A tensor that was made in inference mode does not count its changes.
    return None if tensor is None else (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
