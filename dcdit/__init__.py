"""dcdit: dynamic-token diffusion transformers whose FLOP savings become wall-clock time."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcdit.integrations import patch, unpatch
    from dcdit.sample.image_generator import load

__version__ = "0.1.0"
__all__ = ["__version__", "load", "patch", "unpatch"]

_LAZY = {
    "load": "dcdit.sample.image_generator",
    "patch": "dcdit.integrations",
    "unpatch": "dcdit.integrations",
}
"""Public names to the modules that have them. They need PyTorch, so they are imported on first use."""

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a library says nothing unless its user asks


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
