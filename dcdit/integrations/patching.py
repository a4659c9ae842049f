"""Patching a model in place by changing the classes of some of its modules.

A patched module has a subclass of its own class, whose ``forward`` runs on :mod:`dcdit.ops`. Weights, state dict,
hooks, ``isinstance`` and the name of the class stay as they are, and a copy or a pickle of the model is patched too.
Classes are recognised by their names and parts and never imported, because code that people copy has no fixed place.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

from torch import nn

from dcdit.integrations import hnet, official

Model = TypeVar("Model", bound=nn.Module)

RECOGNISERS: tuple[Callable[[nn.Module], type | None], ...] = (official.recognise, hnet.recognise)
"""From a module to the class with the methods that replace its own, or None. ValueError where they would be wrong."""
KNOWN = (
    "the DC-DiT of AMD-AGI/DynamicChunkingDiT (modules HNet and HNetDiTBlock), "
    "the H-Net of goombalab/hnet (RoutingModule, ChunkLayer and DeChunkLayer)"
)


def patch(model: Model) -> Model:
    """Speed up a model of another code base in place; see ``docs/patching.md`` for which and how.

    Nothing but the ``forward`` and ``step`` methods of some modules changes: weights, state dict, gradients, hooks and
    the code that trains or samples the model stay as they are. Patch before ``torch.compile``. Patched again, a model
    stays as it is.

    Args:
        model: of a known code base, or any module that holds one.

    Returns:
        The model itself.

    Raises:
        ValueError: no part of it is known, or a part has an option that the replacement does not have. Then nothing is
            changed.

    Example:
        >>> import torch
        >>> import dcdit
        >>> class RoutingModule(torch.nn.Module):  # stands for that of goombalab/hnet
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.q_proj_layer = self.k_proj_layer = torch.nn.Linear(4, 4, bias=False)
        >>> model = torch.nn.Sequential(RoutingModule())
        >>> before = type(model[0])
        >>> dcdit.patch(model) is model, type(model[0]) is before, isinstance(model[0], before)
        (True, False, True)
        >>> dcdit.patch(torch.nn.Sequential(torch.nn.Linear(4, 4)))
        Traceback (most recent call last):
            ...
        ValueError: no module of Sequential is known; accepted: the DC-DiT of AMD-AGI/DynamicChunkingDiT ...
    """
    found = [(module, _methods_for(module)) for module in model.modules() if not is_patched(module)]
    chosen = [(module, methods) for module, methods in found if methods is not None]
    if not chosen and not any(map(is_patched, model.modules())):
        raise ValueError(f"no module of {type(model).__name__} is known; accepted: {KNOWN}")
    for module, methods in chosen:
        original: Any = type(module)
        module.__class__ = _patched_class(original, methods)
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`. A model that is not patched stays as it is. Returns the model itself.

    Example:
        >>> import torch
        >>> import dcdit
        >>> class RoutingModule(torch.nn.Module):  # stands for that of goombalab/hnet
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.q_proj_layer = self.k_proj_layer = torch.nn.Linear(4, 4, bias=False)
        >>> model = RoutingModule()
        >>> type(dcdit.unpatch(dcdit.patch(model))) is RoutingModule
        True
    """
    for module in model.modules():
        if is_patched(module):
            module.__class__ = module.original  # type: ignore[assignment]
    return model


class Patched:
    """Base of every patched class."""

    original: type[nn.Module]
    methods: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the two classes that this one is made of: it has no place that it could be imported
        from."""
        return _new, (self.original, self.methods), self.__dict__.copy()


def is_patched(module: nn.Module) -> TypeGuard[Patched]:
    """Whether :func:`patch` has changed the class of this very module."""
    return isinstance(module, Patched)


def _methods_for(module: nn.Module) -> type | None:
    return next((methods for recognise in RECOGNISERS if (methods := recognise(module)) is not None), None)


@functools.cache
def _patched_class(original: Any, methods: type) -> Any:
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (Patched, methods, original), {**names, "original": original, "methods": methods})


def _new(original: Any, methods: type) -> Any:
    """An empty instance, which its state fills."""
    cls = _patched_class(original, methods)
    return cls.__new__(cls)
