"""Which operations there are, and how a backend finds its own.

The operations are the public functions of :mod:`dcdit.ops.reference`. A backend is a package whose modules define each
of them once, with the same name and the same arguments.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from dcdit.ops import reference

CHOOSES_KERNELS_ITSELF = frozenset({"varlen_attention"})
"""Operations without a twin in the backends: their public function picks one of several foreign kernels."""


def functions_of(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """The public functions that a module defines, not those it imports."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return {name: f for name, f in functions if f.__module__ == module.__name__ and not name.startswith("_")}


OPERATIONS = frozenset(functions_of(reference))
"""The names of all operations."""


def collect_operations(package: str, path: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """Import every module of a backend and return the operations that they define, by name.

    Args:
        package: ``__name__`` of the backend.
        path: its ``__path__``.

    Raises:
        ImportError: an operation is missing, or two modules define it.
    """
    found: dict[str, Callable[..., Any]] = {}
    for info in pkgutil.iter_modules(path):
        module = importlib.import_module(f"{package}.{info.name}")
        for name, function in functions_of(module).items():
            if name in found:
                raise ImportError(f"{name} is defined by {found[name].__module__} and by {module.__name__}")
            if name in OPERATIONS:
                found[name] = function
    missing = OPERATIONS - CHOOSES_KERNELS_ITSELF - found.keys()
    if missing:
        raise ImportError(f"{package} does not define {', '.join(sorted(missing))}")
    return found
