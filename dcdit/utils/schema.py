"""Dataclasses that are built from plain mappings and checked. Every field has its documentation and its bounds."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from dcdit.utils.text import printable, short

T = TypeVar("T")


class WrongType(TypeError, ValueError):
    """A value of another type than its key takes. Like every error that a user can cause, it is a ValueError too."""


def option(
    default: Any,
    doc: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its documentation and the values that it accepts (None is never out of bounds)."""
    bounds = {"at_least": at_least, "at_most": at_most, "above": above, "below": below}
    metadata = {"doc": doc, **bounds, "choices": choices}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def build(cls: type, data: Any, where: str = "") -> Any:
    """An instance of the dataclass ``cls`` (its fields may be dataclasses) from nested mappings.

    Raises:
        ValueError: unknown key.
        WrongType: a value of another type. Both messages name the key with its section.
    """
    if not isinstance(data, dict):
        raise WrongType(f"{where.rstrip('.') or 'configuration'} is {short(data)}; accepted: a section of keys")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        if key not in hints:
            known = ", ".join(hints)
            raise ValueError(
                f"unknown configuration key '{where}{printable(key, 100)}'; accepted: {known}{did_you_mean(key, hints)}"
            )
        if dataclasses.is_dataclass(hints[key]):
            values[key] = build(hints[key], {} if value is None else value, f"{where}{key}.")
        else:
            values[key] = _convert(value, hints[key], f"{where}{key}")
    return cls(**values)


def check_bounds(section: Any, where: str) -> None:
    """Raise ValueError if a value of the dataclass instance is not one that its field accepts."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        accepted = _accepted(field.metadata)
        if value is None or not accepted:
            continue
        values = value if isinstance(value, list) else [value]
        if not values or not all(_inside(v, field.metadata) for v in values):
            hint = did_you_mean(value, field.metadata["choices"])
            items = "" if field.metadata["choices"] else "numbers "
            what = f"a non-empty list of {items}" if isinstance(value, list) else ""
            raise ValueError(f"{where}{field.name} is {short(value)}; accepted: {what}{accepted}{hint}")


def _inside(value: Any, bounds: typing.Mapping[str, Any]) -> bool:
    if bounds["choices"]:
        return value in bounds["choices"]
    return (
        (bounds["at_least"] is None or value >= bounds["at_least"])
        and (bounds["at_most"] is None or value <= bounds["at_most"])
        and (bounds["above"] is None or value > bounds["above"])
        and (bounds["below"] is None or value < bounds["below"])
    )


def _accepted(bounds: typing.Mapping[str, Any]) -> str:
    if bounds["choices"]:
        return ", ".join(bounds["choices"])
    words = {"at_least": "at least", "above": "above", "below": "below", "at_most": "at most"}
    return " and ".join(f"{word} {_number(bounds[key])}" for key, word in words.items() if bounds[key] is not None)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _convert(value: Any, hint: Any, name: str) -> Any:
    """``value`` as the type ``hint``. Floats may be whole numbers, or text such as 1e-4, which YAML reads as text."""
    for wanted in typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        kind = typing.get_origin(wanted) or wanted
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            number = _finite(value)
            if number is not None:
                return number
        elif kind is list and isinstance(value, list):
            (item,) = typing.get_args(wanted)
            return [_convert(v, item, f"{name}[{i}]") for i, v in enumerate(value)]
        elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    raise WrongType(f"{name} is {short(value)}; accepted: {type_name(hint)}")


def _finite(value: int | float | str) -> float | None:
    try:
        number = float(value)
    except (ValueError, OverflowError):  # of text that is no number, of a whole number beyond 1e308
        return None
    return number if math.isfinite(number) else None


# --- dataclasses that say by themselves what they accept ----------------------------------------------------------


def from_mapping(cls: type[T], data: Any, where: str) -> T:
    """An instance of the dataclass ``cls`` from a mapping as it comes from a file.

    Args:
        where: the mapping comes from, for error messages.

    Raises:
        ValueError: no mapping, a missing key, what :func:`check_values` refuses, or a value that ``cls`` refuses.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    if not isinstance(data, dict):
        known = ", ".join(field.name for field in fields)
        raise ValueError(f"{where} is {short(data)}; accepted: a mapping with the keys {known}")
    check_values(cls, data, where)
    for field in fields:
        if field.name not in data and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} lacks the key {field.name!r}")
    return cls(**data)


def check_values(cls: type, values: typing.Mapping[str, Any], where: str) -> None:
    """Check names and types of some of the values of a dataclass, whatever the others are.

    A bool is no number here, a float may be a whole number, and numbers are finite.

    Raises:
        ValueError: a name that is no field of ``cls`` (with the nearest that is one), or a value of another type than
            the field is declared with.
    """
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    for name, value in values.items():
        if name not in known:
            raise ValueError(
                f"unknown key {short(name)} in {where}; accepted: {', '.join(known)}{did_you_mean(name, known)}"
            )
        if not _is(value, hints[name]):
            finite = "finite " if isinstance(value, float) else ""
            raise ValueError(f"{name} is {short(value)}; accepted: {finite}{type_name(hints[name])}")


def check_types(instance: Any) -> None:
    """:func:`check_values` for all values of a dataclass instance."""
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}
    check_values(type(instance), values, type(instance).__name__)


def is_size(value: Any, largest: int) -> bool:
    """Whether a value is a positive integer up to ``largest``."""
    return type(value) is int and 1 <= value <= largest  # bool is a kind of int in Python


def _is(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_is(value, part) for part in typing.get_args(hint))
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _finite(value) is not None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return False
    if kind is tuple:
        return len(value) == len(parts) and all(_is(*pair) for pair in zip(value, parts, strict=True))
    return kind is not list or all(_is(item, parts[0]) for item in value)


# --- words ----------------------------------------------------------------------------------------------------------


def type_name(hint: Any) -> str:
    """A type for error messages and help: ``int or null``, ``list of float``."""
    if isinstance(hint, types.UnionType):
        return " or ".join(type_name(part) for part in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if kind is list:
        return f"list of {type_name(typing.get_args(hint)[0])}"
    if kind is tuple:
        return f"({', '.join(map(type_name, typing.get_args(hint)))})"
    return {type(None): "null", dict: "mapping", str: "text"}.get(kind, kind.__name__)


def did_you_mean(name: Any, accepted: Iterable[str]) -> str:
    """``; did you mean 'lr'?`` if an accepted name is close to ``name``, else an empty text."""
    names = {one.lower(): one for one in accepted}
    close = difflib.get_close_matches(str(name).lower(), names, n=1)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def describe(cls: type) -> str:
    """Every key of a dataclass of sections, one per line, with its meaning, type and default."""
    lines = []
    for section in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[section.name]
        lines.append(f"{section.name}: {meaning(kind)}")
        for field in dataclasses.fields(kind):
            name = f"{section.name}.{field.name}"
            lines.append(f"  {name:<25} {field.metadata['doc']} ({about(kind, field)})")
    return "\n".join(lines)


def meaning(section: type) -> str:
    """What a section is for: the first line of its docstring."""
    return (section.__doc__ or "").partition("\n")[0]


def about(section: type, field: "dataclasses.Field[Any]") -> str:
    """Type, bounds and default of a key: ``int, at least 1, default 256``."""
    default = field.default_factory() if callable(field.default_factory) else field.default
    shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else default
    bounds = "" if field.metadata["choices"] else _accepted(field.metadata)
    parts = (type_name(typing.get_type_hints(section)[field.name]), bounds, f"default {shown}")
    return ", ".join(part for part in parts if part)
