"""What to ask of a model that may be a function, a module, or a module inside a wrapper."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def unwrap_model(model: Callable[..., Any]) -> Any:
    """The module inside the wrappers of torch.compile and DistributedDataParallel; anything else as it is."""
    for wrapper in ("_orig_mod", "module"):
        if isinstance(getattr(model, wrapper, None), nn.Module):
            return unwrap_model(getattr(model, wrapper))
    return model


def accepts_keyword(model: Callable[..., Any], name: str) -> bool:
    """Whether the model can be called with this keyword argument."""
    parameters = signature_of(model).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def signature_of(model: Callable[..., Any]) -> inspect.Signature:
    """Of a call of the model, inside of its wrappers."""
    model = unwrap_model(model)
    return inspect.signature(model.forward if isinstance(model, nn.Module) else model)


def name_of(model: Callable[..., Any]) -> str:
    """The name of the function, or of the class of the module, also of one whose calls another object records."""
    model = unwrap_model(model)
    recorded = getattr(model, "model", None)
    model = recorded if isinstance(recorded, nn.Module) else model
    return getattr(model, "__name__", type(model).__name__)


def dtype_of(model: Callable[..., Any]) -> torch.dtype:
    """The dtype that the weights compute in; float32 for a model without such weights.

    Integers and 8-bit floats are skipped: they only store a weight, and its module computes in another dtype.
    """
    # Models ask this of a layer in every forward pass, so without parameters(), which takes three times as long.
    model = model if isinstance(model, nn.Module) else unwrap_model(model)
    modules = model.modules() if isinstance(model, nn.Module) else ()
    weights = (weight for module in modules for weight in module._parameters.values() if weight is not None)
    return next((w.dtype for w in weights if w.is_floating_point() and w.itemsize > 1), torch.float32)


@contextmanager
def evaluating(model: Callable[..., Any]) -> Iterator[None]:
    """Put a module into evaluation mode inside the block, and back into training mode after it if it was there."""
    if not (isinstance(model, nn.Module) and model.training):
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
