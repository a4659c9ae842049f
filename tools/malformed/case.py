"""The table of malformed inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.malformed.base import Base

Make = Callable[[Base, Path], list[str]]
"""Makes an input in an empty folder; returns the arguments of ``dcdit`` that read it."""


@dataclass(frozen=True)
class Case:
    """A malformed input and what a command has to say about it."""

    reader: str
    """What reads it."""
    name: str
    make: Make
    names: str
    """What the message names: a file, or the option that holds the value."""
    says: str
    """Regular expression: what is wrong."""
    skipped: bool
    """The command was asked to leave damaged samples out: it ends well, with a warning in place of the error."""


CASES: list[Case] = []
"""All of them, in the order of their modules."""


def malformed(reader: str, names: str, says: str, skipped: bool = False) -> Callable[[Make], Make]:
    """Add the decorated function to :data:`CASES`, under its own name. The arguments are those of :class:`Case`."""

    def add(make: Make) -> Make:
        CASES.append(Case(reader, make.__name__, make, names, says, skipped))
        return make

    return add
