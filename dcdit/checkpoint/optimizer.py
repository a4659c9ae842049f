"""The state of an optimiser as tensors by name, and back."""

from pathlib import Path

import torch
from torch import Tensor

from dcdit.checkpoint.model import Model, Tensors


def load_optimizer(model: Model, optimizer: torch.optim.Optimizer, tensors: Tensors, source: str | Path) -> None:
    """Restore the state of an optimiser over ``model.parameters()``.

    Args:
        tensors: as :func:`optimizer_tensors` gives them.
        source: where they come from, for error messages.

    Raises:
        ValueError: state of a parameter that the model does not have, or of another shape; a parameter that has only
            some of the entries that others have.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import load_optimizer, optimizer_tensors
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> old, new = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(model.parameters())
        >>> model(torch.randn(1, 4, 4, 4), torch.tensor([5]), torch.tensor([3])).sum().backward()
        >>> old.step()
        >>> load_optimizer(model, new, optimizer_tensors(model, old), "memory")
        >>> weight = model.final_layer.linear.weight
        >>> torch.equal(new.state[weight]["exp_avg"], old.state[weight]["exp_avg"]), old.state[weight]["step"].item()
        (True, 1.0)
    """
    parameters = dict(model.named_parameters())
    names = list(parameters)
    state: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(names))}
    index_of = {name: index for index, name in enumerate(names)}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in index_of:
            raise ValueError(f"{source} has optimiser state for the unknown parameter {name!r}")
        if tensor.shape not in ((), parameters[name].shape):
            shape = list(parameters[name].shape)
            raise ValueError(
                f"{source}: {key} has shape {list(tensor.shape)}; accepted: {shape}, that of its parameter"
            )
        if tensor.shape and tensor.stride() != parameters[name].stride():
            # Fused kernels read weights and moments in the order of their memory; weights may be channels-last.
            tensor = torch.empty_like(parameters[name], dtype=tensor.dtype).copy_(tensor)
        state[index_of[name]][entry] = tensor
    entries = set().union(*state.values())
    for name, index in index_of.items():
        missing = sorted(entries - state[index].keys())
        if state[index] and missing:
            raise ValueError(
                f"{source} lacks {name}/{missing[0]}; accepted: all of {', '.join(sorted(entries))}, or none"
            )
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {i: s for i, s in state.items() if s}, "param_groups": groups})


def optimizer_tensors(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser over ``model.parameters()``, by ``<parameter>/<entry>``.

    Example:
        >>> import torch
        >>> from dcdit.checkpoint import optimizer_tensors
        >>> from dcdit.models import create_model
        >>> model = create_model("DiT-S/2", grid=(4, 4), hidden_size=32, depth=1, num_heads=2, num_classes=10)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.randn(1, 4, 4, 4), torch.tensor([5]), torch.tensor([3])).sum().backward()
        >>> optimizer.step()
        >>> sorted(name for name in optimizer_tensors(model, optimizer) if name.startswith("final_layer.linear.bias"))
        ['final_layer.linear.bias/exp_avg', 'final_layer.linear.bias/exp_avg_sq', 'final_layer.linear.bias/step']
    """
    state = optimizer.state_dict()["state"]
    names = [name for name, _ in model.named_parameters()]
    return {f"{names[i]}/{entry}": torch.as_tensor(v) for i, entries in state.items() for entry, v in entries.items()}
