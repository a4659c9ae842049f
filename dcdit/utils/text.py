"""How messages write values."""

import reprlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 2000
"""Characters of a message; a longer one loses its middle."""


def shape_of(tensor: "Tensor") -> str:
    """A shape as ``(2, 16, 64)``. Works under ``torch.compile`` too, where a size may be symbolic."""
    return "(" + ", ".join(str(size) for size in tensor.shape) + ")"


def printable(text: object, longest: int = LONGEST) -> str:
    r"""A text in one line that a terminal shows as it is.

    Names and messages in files of strangers may hold characters that mislead. Escape codes move the cursor or retitle
    the window, line ends forge a second message, and marks of writing direction show a name backwards. They become
    ``\x1b``, ``\n``, ``\u202e``.

    >>> from dcdit.utils.text import printable
    >>> printable("a\x1b[31mb\n")
    'a\\x1b[31mb\\n'
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
    half = (longest - 5) // 2
    return shown if len(shown) <= longest else f"{shown[:half]} ... {shown[-half:]}"


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100


def short(value: object) -> str:
    """``repr`` of a value from a file, shortened if it is long."""
    return printable(_short.repr(value), 300)


def one_line(error: BaseException) -> str:
    """The message of an error in one printable line: its path first, and the name of its kind if it has no message."""
    if isinstance(error, OSError) and error.strerror:
        paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
        return printable(": ".join([" -> ".join(paths), error.strerror] if paths else [error.strerror]))
    return printable(" ".join(str(error).split())) or type(error).__name__
