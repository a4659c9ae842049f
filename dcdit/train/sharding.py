"""Weights divided over the processes (PyTorch's FSDP2), and the way to whole tensors and back.

Each process holds a part of every parameter, of its gradient, its average and its moments. A block gathers its weights
for its own forward and backward pass. Checkpoints hold whole tensors, so that they do not depend on the number of
processes.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dcdit.checkpoint import Model


def shard(model: Model, device: torch.device) -> None:
    """Divide the parameters of a model over all processes, in place. They become DTensors."""
    # Blocks return views, which no operation of the models writes to.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in (model.modulation, *model.blocks):
        fully_shard(block, mesh=mesh)
    # Not kept whole after a forward pass: a validation has no backward pass that would divide them again.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


@contextlib.contextmanager
def unsynchronised(net: Any, accelerator: Any) -> Iterator[None]:
    """Gradients of the passes inside the block stay on their process, until a pass outside of it adds them up."""
    if not isinstance(net, FSDPModule):
        with accelerator.no_sync(net):
            yield
        return
    net.set_requires_gradient_sync(False)
    yield
    net.set_requires_gradient_sync(True)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, as a view of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor without division. Every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], kept: bool) -> dict[str, Tensor]:
    """Whole tensors by name, one after another. Every process has to call this; those with ``kept`` get them.

    What was divided comes to the CPU, because a device need not have room for all of it.
    """
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if kept:
            found[name] = tensor if full is tensor else full.cpu()
    return found


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, divided as another one is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    # Every process has the whole tensor, so none has to be sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
