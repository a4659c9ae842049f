"""Questions to a model that may be a function, a module, or a module inside a wrapper."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Model = Callable[..., Any]


def unwrapped(model: Model) -> Any:
    """The module inside torch.compile and DistributedDataParallel wrappers; anything else as it is."""
    for wrapper in ("_orig_mod", "module"):
        while isinstance(getattr(model, wrapper, None), nn.Module):
            model = getattr(model, wrapper)
    return model


def takes(model: Model, option: str) -> bool:
    """Whether calling the model with this keyword is possible."""
    model = unwrapped(model)
    parameters = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
    return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def name_of(model: Model) -> str:
    model = unwrapped(model)
    return getattr(model, "__name__", type(model).__name__)


def dtype_of(model: Model) -> torch.dtype:
    """Of its weights; float32 if it has none."""
    model = unwrapped(model)
    weights = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((weight.dtype for weight in weights), torch.float32)


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Evaluation mode, and the former mode back."""
    if not (isinstance(model, nn.Module) and model.training):
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()
