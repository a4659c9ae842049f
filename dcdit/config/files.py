"""A training configuration from and to a YAML file, a recipe, nested dicts, and overrides of single keys."""

import copy
import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dcdit.config.sections import TrainConfig
from dcdit.config.yaml_files import parse_yaml, pyyaml, read_yaml
from dcdit.utils import schema
from dcdit.utils.reading import kind_of_file

RECIPES = Path(__file__).with_name("recipes")
"""Folder of the training configurations that come with the package."""

Overrides = Mapping[str, Any] | Sequence[str]
"""Single keys of a configuration and their new values.

Programs give ``{"section.key": value}``; ``section.key.entry`` sets one entry of a mapping such as ``model.overrides``.
Command lines give ``section.key=value`` texts; see :func:`parse_overrides`.
"""


def recipes() -> dict[str, Path]:
    """The training configurations that come with the package, by name.

    Example:
        >>> from dcdit.config import recipes
        >>> "dc-dit-xl-256" in recipes(), recipes()["dc-dit-xl-256"].name
        (True, 'dc-dit-xl-256.yaml')
    """
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def load_config(path: str | Path | None = None, overrides: Overrides = ()) -> TrainConfig:
    """Read a YAML file or a recipe (without one, all defaults) and set single keys.

    Args:
        path: of the file, or the name of one of the :func:`recipes`; keys that it leaves out take their defaults.
        overrides: see :data:`Overrides`.

    Raises:
        FileNotFoundError: no such file.
        ValueError, TypeError: broken YAML, unknown key, wrong type, value out of bounds; one line that names the key.

    Example:
        >>> from dcdit.config import load_config
        >>> config = load_config("dc-dit-xl-256", {"optim.steps": 1000})
        >>> config.model.name, config.optim.steps
        ('DC-DiT-XL', 1000)
        >>> load_config(None, ["optim.stepz=1000"])
        Traceback (most recent call last):
            ...
        ValueError: unknown configuration key 'optim.stepz'; accepted: steps, flops, ...; did you mean 'steps'?
    """
    return from_dict(given_keys(path, overrides))


def given_keys(path: str | Path | None = None, overrides: Overrides = ()) -> dict[str, Any]:
    """What :func:`load_config` would read, as nested dicts: unchecked, and without the defaults of missing keys.

    Example:
        >>> from dcdit.config import given_keys
        >>> given_keys(None, ["optim.steps=1000", "model.name=DiT-S/2"])
        {'optim': {'steps': 1000}, 'model': {'name': 'DiT-S/2'}}
    """
    return _with({} if path is None else _read(Path(path)), overrides)


def override(config: TrainConfig | dict[str, Any], overrides: Overrides) -> TrainConfig:
    """A copy of a configuration (or of its dicts, as in :func:`from_dict`) with single keys set.

    Args:
        overrides: see :data:`Overrides`.

    Raises:
        ValueError, TypeError: as in :func:`load_config`.

    Example:
        >>> from dcdit.config import TrainConfig, override
        >>> before = TrainConfig()
        >>> override(before, {"optim.steps": 1000}).optim.steps, before.optim.steps
        (1000, 400000)
    """
    return from_dict(_with(to_dict(config) if isinstance(config, TrainConfig) else config, overrides))


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """``section.key=value`` texts of a command line as ``{"section.key": value}``. A value is YAML; the last one wins.

    Raises:
        ValueError: another form, or a value that is not YAML.

    Example:
        >>> from dcdit.config import parse_overrides
        >>> parse_overrides(["optim.steps=1000", "router.drop_fractions=[0, 0.5]"])
        {'optim.steps': 1000, 'router.drop_fractions': [0, 0.5]}
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or "." not in key:
            raise ValueError(f"override {assignment!r}; accepted: section.key=value, e.g. optim.lr=1e-4")
        values.pop(key, None)  # so that the order is that of the last assignments
        values[key] = _parse_yaml(text, assignment)
    return values


def parse_value(key: str, text: str) -> Any:
    """The value of ``text`` for ``key`` (``section.key``): the text itself if the key takes text, else read as YAML.

    Raises:
        ValueError: not YAML.

    Example:
        >>> from dcdit.config import parse_value
        >>> parse_value("optim.steps", "1000"), parse_value("run.out", "1000")  # a folder is text
        (1000, '1000')
    """
    section, _, name = key.partition(".")
    hints = typing.get_type_hints(typing.get_type_hints(TrainConfig)[section])
    return text if str in (hints[name], *typing.get_args(hints[name])) else _parse_yaml(text, f"{key}={text}")


def from_dict(data: dict[str, Any]) -> TrainConfig:
    """The inverse of :func:`to_dict`; missing keys take their defaults. Errors as in :func:`load_config`.

    Example:
        >>> from dcdit.config import from_dict
        >>> config = from_dict({"optim": {"steps": 1000}})
        >>> config.optim.steps, config.optim.batch_size
        (1000, 256)
    """
    return schema.build(TrainConfig, data)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Nested dicts, lists, numbers and text only.

    Example:
        >>> from dcdit.config import TrainConfig, from_dict, to_dict
        >>> to_dict(TrainConfig())["diffusion"], from_dict(to_dict(TrainConfig())) == TrainConfig()
        ({'objective': 'dit'}, True)
    """
    return dataclasses.asdict(config)


def dump_yaml(config: TrainConfig) -> str:
    """The configuration as YAML; :func:`load_config` reads an equal configuration from it.

    Example:
        >>> from pathlib import Path
        >>> from dcdit.config import TrainConfig, dump_yaml, load_config
        >>> _ = Path("config.yaml").write_text(dump_yaml(TrainConfig()))
        >>> load_config("config.yaml") == TrainConfig()
        True
    """
    return pyyaml().safe_dump(to_dict(config), sort_keys=False)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        path = recipes().get(str(path), path)
    try:
        data = read_yaml(path) or {}
    except FileNotFoundError:
        names = recipes()
        raise FileNotFoundError(
            f"no configuration file {str(path)!r}, nor a recipe of that name; accepted: a YAML file, or one of "
            f"{', '.join(names)}{schema.did_you_mean(path, names)}"
        ) from None
    if not isinstance(data, dict):
        what = kind_of_file(path) or f"it holds a {type(data).__name__}"
        raise ValueError(f"{path} is no configuration: {what}; accepted: a mapping of sections")
    return data


def _with(data: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    """A copy of nested dicts with overrides laid over them."""
    values = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    changed = copy.deepcopy(data)
    for key, value in values.items():
        _set(changed, key, value)
    return changed


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    if not sections:
        raise ValueError(f"override {key!r}; accepted: section.key, e.g. optim.lr")
    for section in sections:
        if data.get(section) is None:
            data[section] = {}
        data = data[section]
        if not isinstance(data, dict):
            raise ValueError(f"override {key!r} enters {section!r}, which is not a section")
    data[name] = copy.deepcopy(value)


def _parse_yaml(text: str, assignment: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"override {assignment!r} has a value that is not YAML: {error}") from None
