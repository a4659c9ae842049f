"""YAML that may be of a stranger: plain values only, no key twice, and no text that grows when it is read."""

import types
from collections import Counter
from pathlib import Path
from typing import Any

from dcdit.utils.reading import kind_of, read_bytes
from dcdit.utils.text import one_line

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 100_000, 10_000, 20
"""Of a file, and of what is in it with every alias written out. A configuration has about 100 values, 3 deep,
in 3,000 bytes."""


def read_yaml(path: Path) -> Any:
    """The value in a YAML file.

    Raises:
        OSError: it cannot be opened, or is no regular file.
        ValueError: it is not YAML, holds what is not accepted here (:func:`parse_yaml`), or is too large.
    """
    data = read_bytes(path, MAX_BYTES)
    try:
        return parse_yaml(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {(data and kind_of(data)) or error}") from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Plain values only: no tag of it makes an object.

    Raises:
        ValueError: not YAML, a key twice in a mapping, or too much, too deep or endless once aliases are written out.
    """
    yaml = pyyaml()
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}, yaml) > MAX_VALUES:
            raise ValueError(f"it has too many values once its aliases are written out; accepted: {MAX_VALUES}")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError:
        raise
    except Exception as error:  # a value that does not fit its tag raises anything in PyYAML
        raise ValueError(one_line(error)) from None


def pyyaml() -> types.ModuleType:
    """PyYAML. ModuleNotFoundError with the way to install it if it is missing."""
    try:
        import yaml
    except ImportError:
        raise ModuleNotFoundError("reading YAML needs PyYAML: pip install 'dcdit[train]'") from None
    return yaml


def _size(node: Any, known: dict[Any, int | None], yaml: types.ModuleType, depth: int = 0) -> int:
    """How many values are in a node, with every alias written out. Looks at each node once."""
    if node in known:
        size = known[node]
        if size is None:
            raise ValueError("an alias in it contains itself")
        return size
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested too deep; accepted: {MAX_DEPTH} levels")
    known[node] = None
    parts = []
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if keys and max(keys.values()) > 1:
            raise ValueError(f"the key {keys.most_common(1)[0][0]!r} is there twice in one mapping")
        parts = [part for pair in node.value for part in pair]
    size = known[node] = 1 + sum(_size(part, known, yaml, depth + 1) for part in parts)
    return size
