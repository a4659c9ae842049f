"""Write the package from the sources of ``dcdit.ops``.

In the folder::

    build.toml  flake.nix  CARD.md       what kernel-builder reads
    torch-ext/dcdit_ops/                 the package: ops/, kernels/, utils/ and layers.py
    build/torch-<backend>/               the same for one backend, as ``kernels.get_local_kernel`` loads it

A kernel package may be loaded from any path and several times at once. So what the sources import from ``dcdit``
becomes a relative import, and ``ops/namespace.py``, the name under which operators are registered, is the package's.
kernel-builder (which needs Nix and a network) writes ``build/`` anew, with what it knows of the commit.
"""

import ast
import base64
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEMPLATE = Path(__file__).with_name("template")
SOURCES = {"ops": ROOT / "dcdit/ops", "kernels": ROOT / "kernels", "utils": ROOT / "dcdit/utils"}
"""Part of the package to the folder that it comes from. Of ``utils``, only what the others import."""
MODULE = "dcdit_ops"
NAMESPACE = 'from .._ops import add_op_namespace_prefix\n\n__all__ = ["add_op_namespace_prefix"]\n'
OPS = '''"""The name under which this copy registers its operators with PyTorch."""

import torch

_BACKEND = "cuda" if torch.version.cuda is not None else "rocm" if torch.version.hip is not None else "cpu"
_NAME = "_{module}_" + _BACKEND + "_{identity}"

ops = getattr(torch.ops, _NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    return _NAME + "::" + op_name
'''


def build(out: Path) -> Path:
    """Write the package to a folder; returns it. What an earlier call wrote there is replaced.

    Raises:
        ValueError: the folder holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / "build.toml").is_file():
        raise ValueError(f"{out} holds something else than a kernel package; accepted: a new folder")
    for name in ("torch-ext", "build"):
        shutil.rmtree(out / name, ignore_errors=True)
    files = package_files()
    identity = hashlib.sha1(json.dumps(files, sort_keys=True).encode()).hexdigest()[:7]
    for name in ("build.toml", "flake.nix", "CARD.md"):
        _write(out / name, (TEMPLATE / name).read_text(encoding="utf-8"))
    for name, text in files.items():
        _write(out / "torch-ext" / MODULE / name, text)
    general = tomllib.loads((TEMPLATE / "build.toml").read_text(encoding="utf-8"))["general"]
    for backend in general["backends"]:
        variant = out / "build" / f"torch-{backend}"
        content = {**files, "_ops.py": OPS.format(module=MODULE, identity=identity)}
        for name, text in content.items():
            _write(variant / name, text)
        metadata = {
            "name": general["name"],
            "id": f"_{MODULE}_{backend}_{identity}",
            "version": general["version"],
            "license": general["license"],
            "python-depends": general["python-depends"],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": {name: _digest(text) for name, text in content.items()}},
        }
        _write(variant / "metadata.json", json.dumps(metadata, indent=2))
    return out


def package_files() -> dict[str, str]:
    """The files of the package by their paths in it, without the one that kernel-builder writes (``_ops.py``)."""
    files = {name: (TEMPLATE / name).read_text(encoding="utf-8") for name in ("__init__.py", "layers.py")}
    todo = [f"{part}/{path.relative_to(SOURCES[part])}" for part in ("ops", "kernels") for path in _python(part)]
    while todo:
        name = todo.pop()
        part, _, inside = name.partition("/")
        source = SOURCES[part] / inside
        if name not in files:
            text = source.read_text(encoding="utf-8") if source.is_file() else ""
            files[name], imported = relative(text, depth=name.count("/"))
            todo += [file for module in imported if module[0] == "utils" and (file := _file(module)) not in files]
    files["ops/namespace.py"] = NAMESPACE
    for part in ("kernels", "utils"):
        files.setdefault(f"{part}/__init__.py", "")
    for path in SOURCES["kernels"].glob("configs/*.json"):
        files[f"kernels/configs/{path.name}"] = path.read_text(encoding="utf-8")
    return dict(sorted(files.items()))


def relative(text: str, depth: int) -> tuple[str, list[tuple[str, ...]]]:
    """A source whose imports from ``dcdit`` are relative, and the modules that it imports, without ``dcdit``.

    Args:
        depth: folders between the package and the file.

    Raises:
        ValueError: an import that has no relative form.
    """
    lines, imported = text.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "dcdit" for alias in node.names):
            raise ValueError(f"line {node.lineno} imports a module of dcdit by its name; accepted: from ... import ...")
        if not isinstance(node, ast.ImportFrom) or node.level or (node.module or "").split(".")[0] != "dcdit":
            continue
        module = tuple((node.module or "").split(".")[1:])
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from {'.' * (depth + 1)}{'.'.join(module)} ", 1)
        imported += [module] if len(module) > 1 else [(*module, alias.name) for alias in node.names]
    return "".join(lines), imported


def _python(part: str) -> list[Path]:
    return sorted(SOURCES[part].rglob("*.py"))


def _file(module: tuple[str, ...]) -> str:
    return "/".join(module) + ".py"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
