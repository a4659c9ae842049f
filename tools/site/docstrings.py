"""Our docstrings as mkdocstrings reads them: Sphinx's roles become links, examples and literal blocks become code."""

import ast
import re
from collections.abc import Iterator
from typing import Any

from griffe import Docstring, ExprCall, Extension, Module, NameResolutionError, Object

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")

OPTION = "dcdit.utils.schema.option"
"""Makes a field of the configuration, from its default and its meaning."""


class Docstrings(Extension):
    """Rewrites all docstrings of a package when it has been read."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        for obj in _objects(pkg):
            if obj.is_attribute and isinstance(obj.value, ExprCall) and obj.value.canonical_path == OPTION:
                default, meaning = obj.value.arguments[:2]
                obj.value, obj.docstring = default, Docstring(ast.literal_eval(str(meaning)), parent=obj)
            if obj.docstring is not None:
                obj.docstring.value = rewrite(obj.docstring.value, obj)


def rewrite(text: str, owner: Object) -> str:
    """The docstring of an object, in Markdown."""
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return ROLE.sub(lambda role: _link(role[2], bool(role[1]), owner), text)


def _link(name: str, short: bool, owner: Object) -> str:
    """A link to a name that is seen from ``owner``; plain code if no page has it. A test knows that it exists."""
    try:
        path = owner.resolve(name)
    except NameResolutionError:
        path = name
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'


def _objects(obj: Object) -> Iterator[Object]:
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _objects(member)
