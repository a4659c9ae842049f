"""Old names: they still work for one version, with a warning that gives the new name."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller's caller that ``old`` is now called ``new`` and goes away in the next version."""
    warnings.warn(f"{old} is now {new}; the old name goes away in the next version", DeprecationWarning, stacklevel=3)


def renamed_attributes(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` for a module in which names have changed.

    Args:
        module: its ``__name__``.
        names: old name to new name, both in this module. An old name must not be in use for something else.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", f"{module}.{names[name]}")
        return getattr(importlib.import_module(module), names[name])

    return __getattr__
