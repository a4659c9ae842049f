"""Values and messages of strangers in one line that a terminal shows as it is."""

import errno

import pytest

from dcdit.utils.text import LONGEST, one_line, printable, short


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb", "a\\nb"),
        ("\u202egnp.txt", "\\u202egnp.txt"),
        ("\udcff", "\\udcff"),
        ("ä 猫 ok", "ä 猫 ok"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text, shown):
    assert printable(text) == shown
    assert printable(text).isprintable()


def test_long_texts_lose_their_middle():
    shown = printable("a" * LONGEST + "b" * LONGEST)
    assert len(shown) <= LONGEST and shown.startswith("aaa") and " ... " in shown and shown.endswith("bbb")
    assert len(short([["x" * 10_000] * 1000] * 1000)) < 2000


def test_errors_of_the_system_name_their_path_first():
    assert one_line(OSError(errno.ENOSPC, "No space left on device", "a/b")) == "a/b: No space left on device"
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(EOFError()) == "EOFError"
