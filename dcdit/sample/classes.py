"""Classes to draw, by name or by number."""

import difflib
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def class_numbers(
    classes: int | str | Sequence[int | str] | Tensor, names: Sequence[str], num_classes: int, source: str
) -> list[int]:
    """Class numbers from names and numbers; one, or a sequence.

    Args:
        names: of the classes, in their order; empty where nobody said them.
        num_classes: that the model has.
        source: of the model, for error messages.

    Raises:
        ValueError, TypeError: what is neither, or no class at all.
    """
    if isinstance(classes, Tensor):
        classes = classes.tolist()
    given = [classes] if isinstance(classes, int | str) else list(classes)
    if not given:
        raise ValueError("labels are empty; accepted: at least one class name or number")
    return [_number(one, names, num_classes, source) for one in given]


def _number(one: Any, names: Sequence[str], num_classes: int, source: str) -> int:
    if isinstance(one, str):
        if one in names:
            return names.index(one)
        close = difflib.get_close_matches(one, names, n=3)
        known = ", ".join(close or names[:8])
        what = f"classes such as {known}" if known else "numbers, because the model's file holds no names"
        raise ValueError(f"no class {one!r} in {source}; accepted: {what}")
    try:
        label = operator.index(one)
    except TypeError:
        label = -1
    if isinstance(one, bool) or not 0 <= label < num_classes:
        raise ValueError(f"label {one!r}; accepted: a class name or a number from 0 to {num_classes - 1}")
    return label
