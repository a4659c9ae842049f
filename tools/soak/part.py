"""What a part of the soak found."""

from typing import NamedTuple


class Part(NamedTuple):
    """The result of a part."""

    page: str
    """Markdown: what was done, and a table of what was found."""
    faults: int
    """How often something was wrong; 0 is expected."""
