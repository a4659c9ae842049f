"""The examples in the docstrings of the operations run, and print what they say."""

import doctest
import importlib
import pkgutil

import pytest
import torch

from dcdit import ops

MODULES = sorted(found.name for found in pkgutil.iter_modules(ops.__path__) if not found.name.startswith("_"))
NAMES = {"torch": torch, "ops": ops}
EXAMPLES = [
    example
    for name in MODULES
    for example in doctest.DocTestFinder().find(importlib.import_module(f"dcdit.ops.{name}"), globs=NAMES)
    if example.examples
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name.removeprefix("dcdit.ops."))
def test_example(example: doctest.DocTest) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    runner.run(example, out=said.append)
    assert not runner.failures, "".join(said)


def test_a_wrong_example_is_seen() -> None:
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    with pytest.raises(AssertionError, match=r"Expected:\s+3"):
        test_example(wrong)
