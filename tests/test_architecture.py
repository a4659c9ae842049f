"""Arrows between modules only point down, none of them close a circle, and private names stay inside their package."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    ("cli",),
    ("integrations", "train", "evaluate"),
    ("sample",),
    ("profiling",),
    ("checkpoint",),
    ("data", "diffusion"),
    ("graphs",),
    ("models",),
    ("nn",),
    ("ops",),
    ("kernels",),
    ("config",),
    ("utils",),
)
"""Packages of dcdit from top to bottom; CONTRIBUTING.md draws them. A package may use those below it, and itself."""
NO_ARROW = {("data", "config"), ("diffusion", "ops"), ("diffusion", "models")}
"""Downward, and still not wanted: a dataset knows no training run, and a sampler takes any model."""
ALLOWED = {"dcdit.diffusion.noise -> dcdit.ops.noise"}
"""Except for these."""
LOOSE = {"__init__", "__main__", "kernels"}
"""Modules that lie directly in dcdit/."""


EXAMPLE_LINE = re.compile(r"^ *(>>>|\.\.\.) .*$", re.MULTILINE)


def code_of(path: Path) -> str:
    """The text of a module without the examples in its docstrings, which run in folders of their own."""
    return EXAMPLE_LINE.sub("", path.read_text())


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in ((ROOT / "dcdit", "dcdit"), (ROOT / "kernels", "dcdit.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """Everything that a module imports from dcdit, wherever in the file, as ``module.name``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("dcdit"))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dcdit":
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str:
    """The module that an imported name is, or comes from."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


ARROWS = {module: {module_of(name) for name in imported(path)} - {module, "dcdit"} for module, path in MODULES.items()}


def test_no_module_imports_itself_in_a_circle() -> None:
    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            # A package that imports its own modules is how its names become public, not an arrow between them.
            new = {name for name in ARROWS[todo.pop()] if not start.startswith(f"{name}.")} - seen
            seen |= new
            todo += new
        return seen

    assert [module for module in MODULES if module in reachable(module)] == []


def test_arrows_point_down() -> None:
    level = {package: number for number, layer in enumerate(LAYERS) for package in layer}
    wrong = []
    for module, targets in ARROWS.items():
        if module in ("dcdit", "dcdit.__main__"):
            continue
        for target in targets:
            above, below = package_of(module), package_of(target)
            if above != below and (level[above] >= level[below] or (above, below) in NO_ARROW):
                wrong.append(f"{module} -> {target}")
    assert set(wrong) == ALLOWED


def test_private_names_stay_in_their_package() -> None:
    """A module may use what starts with an underscore in its own folder, and a package its own private folders."""
    wrong = []
    for module, path in MODULES.items():
        home = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for name in imported(path):
            parts = name.split(".")
            private = next((i for i, part in enumerate(parts) if part.startswith("_") and part != "__version__"), None)
            if private is not None and not f"{home}.".startswith(".".join(parts[:private]) + "."):
                wrong.append(f"{module} imports {name}")
    assert wrong == []


WRITING = re.compile(r"\.(write_text|write_bytes|mkdir|rmdir|unlink|rename|touch|symlink_to|rmtree|move|makedirs)\(")
WRITERS = {
    "dcdit/utils/files.py",
    "dcdit/utils/lock.py",
    "dcdit/utils/outputs.py",
    "dcdit/checkpoint/run.py",  # what is inside a checkpoint, while that is written
    "dcdit/data/latents/manifest.py",  # deletes the entries that the manifest has taken over
    "dcdit/evaluate/generate.py",  # deletes the batches that it has put together
}


def test_files_are_written_and_deleted_in_one_place() -> None:
    """``dcdit.utils.files`` is why nothing is lost. Whoever writes or deletes in another way has to be known here."""
    found = {str(path.relative_to(ROOT)) for path in MODULES.values() if WRITING.search(code_of(path))}
    assert found == WRITERS


READING = re.compile(
    r"\.read_text\(|\.read_bytes\(|np\.load\(|torch\.load\(|safe_open\(|json\.load\(|safe_load\(|(?<![\w.])open\("
)
READERS = {
    "dcdit/utils/reading.py",
    "dcdit/utils/tensors.py",
    "dcdit/utils/pickles.py",
    "dcdit/sample/page.py",  # its own template
    "dcdit/utils/environment.py",  # of the system, like profiling/load.py
    "dcdit/profiling/load.py",
    "dcdit/cli/configurations.py",  # the recipes of this package
    "dcdit/cli/demo.py",  # its own log
    "kernels/launch.py",
}


def test_files_are_read_in_one_place() -> None:
    """``dcdit.utils.reading`` is why no pipe hangs and no header takes all memory. Others have to be known here."""
    found = {str(path.relative_to(ROOT)) for path in MODULES.values() if READING.search(code_of(path))}
    assert found <= READERS, found - READERS


SPEAKING = re.compile(
    r"\bprint\(|sys\.std(out|err)\b|\blogging\.(debug|info|warning|error|basicConfig)\(|getLogger\((?!__name__\))"
)


def test_the_library_prints_nothing() -> None:
    """It logs under its own name, and warns; the command line prints."""
    found = [name for name, path in MODULES.items() if SPEAKING.search(code_of(path))]
    assert [name for name in found if package_of(name) != "cli"] == []


def test_few_modules_lie_loose() -> None:
    assert {path.stem for path in (ROOT / "dcdit").glob("*.py")} == LOOSE


def test_tools_and_the_package_never_use_the_tests() -> None:
    for folder in ("dcdit", "kernels", "tools", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert not any(name.split(".")[0] in ("support", "tests") for name in names), path
