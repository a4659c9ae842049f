"""What the documentation says is so: examples run and print what they say, and every public name has one.

``make docs`` builds the site and finds broken links; this needs no mkdocs.
"""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from dcdit import ops

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "dcdit").rglob("*.py"))
}
PAGES = ("index.md", "one-operation.md", "gpu.md")
"""Pages of ``docs/`` whose Python is one program. (sampling.md and hnet.md have tests of their own.)"""
API = {
    re.search(r"^::: (\S+)$", page.read_text(), re.MULTILINE)[1]
    for page in (ROOT / "docs" / "api").glob("*.md")
    if page.name != "index.md"
}
FOREIGN = {"dcdit.integrations.diffusers.ModelMixin"}
"""Public here for a reason, and documented where it comes from."""
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")


class Documented(NamedTuple):
    """A docstring and where it stands."""

    module: str
    owner: str
    """The class or function, with dots; empty for the module."""
    text: str


def docstrings(module: str) -> Iterator[Documented]:
    def walk(node: Any, owner: str) -> Iterator[Documented]:
        body = node.body
        for before, statement in zip([None, *body], body, strict=False):
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                yield from walk(statement, f"{owner}.{statement.name}".lstrip("."))
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                name = ""
                if isinstance(before, ast.Assign | ast.AnnAssign):  # a constant or a field, and what it means
                    name = ast.unparse(before.targets[0] if isinstance(before, ast.Assign) else before.target)
                if isinstance(text := statement.value.value, str):
                    yield Documented(module, ".".join(filter(None, (owner, name))), inspect.cleandoc(text))

    yield from walk(ast.parse(SOURCES[module].read_text()), "")


DOCSTRINGS = [found for module in SOURCES for found in docstrings(module)]
EXAMPLES = [found for found in DOCSTRINGS if ">>>" in found.text]


def run_example(text: str, names: dict[str, Any]) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    said: list[str] = []
    runner.run(doctest.DocTestParser().get_doctest(text, names, "example", None, None), out=said.append)
    assert runner.summarize(verbose=False).attempted and not runner.failures, "".join(said)


@pytest.mark.parametrize("found", EXAMPLES, ids=lambda found: f"{found.module.removeprefix('dcdit.')}.{found.owner}")
def test_example(found: Documented, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    torch.manual_seed(0)
    names = {"torch": torch, "ops": ops} if found.module.startswith("dcdit.ops") else {}
    run_example(found.text, {**names, "__name__": "example"})


def test_a_wrong_example_is_seen() -> None:
    with pytest.raises(AssertionError, match=r"Expected:\s+3"):
        run_example(">>> 1 + 1\n3\n", {})


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "page"})


def test_every_package_with_public_names_has_a_page() -> None:
    public = {module for module, path in SOURCES.items() if re.search(r"^__all__ =", path.read_text(), re.MULTILINE)}
    packages = {module for module in public if SOURCES[module].name == "__init__.py" and module.count(".") < 2}
    assert packages <= API  # what lies deeper is reached through these
    assert set(SOURCES) >= API


@pytest.mark.parametrize("package", sorted(API))
def test_every_public_name_is_documented_with_an_example(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__doc__
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        if f"{package}.{name}" in FOREIGN or name == "__version__" or isinstance(thing, ModuleType):
            continue
        own = {found.text for found in DOCSTRINGS if found.owner == name}
        assert own, f"{package}.{name} has no docstring"
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert any(">>>" in text for text in own), f"{package}.{name} has no example"


def exists(name: str, found: Documented) -> bool:
    """Whether a name is something, seen from where a docstring stands."""
    scopes = [found.module, *(f"{found.module}:{owner}" for owner in _outwards(found.owner))]
    return any(_resolves(f"{scope}{'.' if ':' in scope else ':'}{name}") for scope in scopes) or _resolves(name)


def _outwards(owner: str) -> Iterator[str]:
    while owner:
        yield owner
        owner = owner.rpartition(".")[0]


def _resolves(path: str) -> bool:
    try:
        pkgutil.resolve_name(path)
    except (ImportError, ValueError):
        return False
    except AttributeError:  # a field without a default, or one that __init__ sets
        holder, _, name = path.rpartition(".")
        try:
            cls = pkgutil.resolve_name(holder)
        except (ImportError, ValueError, AttributeError):
            return False
        return inspect.isclass(cls) and bool(re.search(rf"\bself\.{name}\b|^ +{name}: ", inspect.getsource(cls), re.M))
    return True


def test_names_in_docstrings_exist() -> None:
    wrong = [
        f"{found.module}.{found.owner}: {name}"
        for found in DOCSTRINGS
        for name in ROLE.findall(found.text)
        if not exists(name, found)
    ]
    assert wrong == []
