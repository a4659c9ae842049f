"""Activation checkpointing computes again on the backend of the forward.

``torch.utils.checkpoint`` runs a function a second time inside the backward, when the ``with`` block of its forward may
have ended, and on a GPU in another thread. It restores the random state and autocast by itself and lets nobody add to
that list, so the function that it keeps for the second run is wrapped here. Importing this module does it.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint

from dcdit.ops.backend import keep_backend


def _on_this_backend(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, always on the backend that operations run on now."""
    backend = keep_backend()

    def call(*args: Any, **kwargs: Any) -> Any:
        with backend:
            return function(*args, **kwargs)

    return call


def _wrap_kept_function(owner: type, method: str) -> None:
    """Wrap the function that a method gets after ``self`` or ``ctx``: the one that the second run calls."""
    original = getattr(owner, method)

    @functools.wraps(original)
    def with_wrapped(self: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return original(self, _on_this_backend(function), *args, **kwargs)

    setattr(
        owner, method, staticmethod(with_wrapped) if isinstance(owner.__dict__[method], staticmethod) else with_wrapped
    )


_wrap_kept_function(checkpoint.CheckpointFunction, "forward")  # use_reentrant=True
if hasattr(checkpoint, "_CheckpointFrame"):  # use_reentrant=False; a private name, which another torch may lack
    _wrap_kept_function(checkpoint._CheckpointFrame, "__init__")
