"""NamedTuples of tensors and numbers as flat lists of their leaves, for the parts of PyTorch that accept only those.

``torch.library`` wants a flat signature and ``ctx.save_for_backward`` flat tensors. With these helpers a list of
tensors is written once, as the fields of a NamedTuple.
"""

from collections.abc import Callable, Iterator
from typing import Any, get_args, get_origin, get_type_hints

from torch import Tensor

_TENSOR = object()
"""Marks where a tensor was taken out."""


def parts(kind: Any) -> tuple[tuple[str, Any], ...]:
    """Name and type of each part of a NamedTuple class or of a ``tuple[A, B]``; nothing for any other type."""
    if hasattr(kind, "_fields"):
        return tuple(get_type_hints(kind).items())
    if get_origin(kind) is tuple:
        return tuple((str(index), part) for index, part in enumerate(get_args(kind)))
    return ()


def leaf_types(kind: Any, name: str) -> list[tuple[str, Any]]:
    """Name and type of each leaf of a type: the field names of a NamedTuple, ``name_0``, ... of a tuple."""
    if not parts(kind):
        return [(name, kind)]
    prefix = "" if hasattr(kind, "_fields") else f"{name}_"
    return [leaf for part, inner in parts(kind) for leaf in leaf_types(inner, prefix + part)]


def leaves(value: Any) -> list[Any]:
    """The leaves of a value, in order."""
    if not isinstance(value, tuple):
        return [value]
    return [leaf for part in value for leaf in leaves(part)]


def builder(kind: Any) -> Callable[[Iterator[Any]], Any]:
    """A function that makes a value of the given type from the next leaves of an iterator."""
    if not parts(kind):
        return next
    builders = [builder(part) for _, part in parts(kind)]
    return lambda values: _tuple_like(kind, [build(values) for build in builders])


def save(ctx: Any, *values: Any) -> None:
    """Keep values for the backward of an autograd function: its tensors where autograd keeps them, the rest on ctx."""
    tensors: list[Tensor] = []
    ctx.without_tensors = _take_tensors(values, tensors)
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> Any:
    """The values that :func:`save` kept."""
    return _put_tensors(ctx.without_tensors, iter(ctx.saved_tensors))


def _take_tensors(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return _TENSOR
    if not isinstance(value, tuple):
        return value
    return _tuple_like(value, [_take_tensors(part, tensors) for part in value])


def _put_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    if value is _TENSOR:
        return next(tensors)
    if not isinstance(value, tuple):
        return value
    return _tuple_like(value, [_put_tensors(part, tensors) for part in value])


def _tuple_like(kind: Any, values: list[Any]) -> Any:
    """A NamedTuple of this class (or of this value's class), or a plain tuple."""
    return kind._make(values) if hasattr(kind, "_make") else tuple(values)
