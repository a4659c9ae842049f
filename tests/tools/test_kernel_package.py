"""The package for Hugging Face's kernels: what it may import, and that it computes what dcdit.ops does, beside it."""

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from support import packaged_calls
from torch import nn

from dcdit import ops
from tools.kernel_package import build
from tools.kernel_package.build import SOURCES, TEMPLATE, package_files, relative

MAY_BE_IMPORTED = {*sys.stdlib_module_names, "torch", "triton", "einops"}
"""kernel-builder allows the standard library, PyTorch and einops; Triton comes with PyTorch."""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return build(tmp_path_factory.mktemp("package") / "dcdit-ops")


@pytest.fixture(scope="module")
def loaded(package):
    return packaged_calls.load(package / "build" / "torch-cpu")


def test_imports_and_syntax(package):
    """Python 3.10 is the oldest that PyTorch 2.10 runs on."""
    sources = list((package / "torch-ext" / "dcdit_ops").rglob("*.py"))
    assert len(sources) > 60
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(), feature_version=(3, 10))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.split(".")[0] for name in names} <= MAY_BE_IMPORTED, source


def test_what_kernel_builder_reads(package):
    settings = tomllib.loads((package / "build.toml").read_text())
    assert settings["torch-noarch"] == {"pyext": ["py", "json"]} and "json" in settings["torch-noarch"]["pyext"]
    assert (package / "torch-ext" / settings["general"]["name"].replace("-", "_") / "__init__.py").is_file()
    for backend in settings["general"]["backends"]:
        variant = package / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        files = {str(path.relative_to(variant)) for path in variant.rglob("*") if path.is_file()}
        assert set(metadata["digest"]["files"]) == files - {"metadata.json"}
        assert metadata["id"].isidentifier() and metadata["backend"] == {"type": backend}


def test_tuned_configurations_are_part_of_it(monkeypatch, tmp_path):
    kernels = shutil.copytree(SOURCES["kernels"], tmp_path / "kernels")
    (kernels / "configs" / "a100.sm80.json").write_text("{}")
    monkeypatch.setitem(SOURCES, "kernels", kernels)
    assert package_files()["kernels/configs/a100.sm80.json"] == "{}"


def test_the_package_looks_for_them_in_itself(package, loaded):
    assert loaded.ops.attention.__name__.startswith(loaded.__name__)
    folder = importlib.import_module(f"{loaded.__name__}.kernels.launch").CONFIG_FOLDER
    assert folder == package / "build" / "torch-cpu" / "kernels" / "configs"


def test_layers_have_no_constructor_and_no_state():
    tree = ast.parse((TEMPLATE / "layers.py").read_text())
    layers = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(layers) == 2
    for layer in layers:
        assert [node.name for node in layer.body if isinstance(node, ast.FunctionDef)] == ["forward"]
        assert {n.target.id for n in layer.body if isinstance(n, ast.AnnAssign) and n.value} == {"can_torch_compile"}


def test_the_package_computes_the_same_without_dcdit(package, tmp_path):
    """In a process of its own, to the bit; the Triton kernels in the interpreter."""
    script, out = packaged_calls.__file__, tmp_path / "results.pt"
    environment = {**os.environ, "PYTHONPATH": "", "TRITON_INTERPRET": "1"}
    command = [sys.executable, script, str(package / "build" / "torch-cpu"), str(out)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for backend, found in torch.load(out, weights_only=True).items():
        expected = packaged_calls.results(ops, backend)
        assert len(found) == len(expected) and all(map(torch.equal, found, expected)), backend


def test_two_copies_and_dcdit_in_one_process(package, loaded, tmp_path):
    """Each has operators of its own, and its own backend."""
    variant = package / "build" / "torch-cpu"
    moved = tmp_path / "other"
    for path in variant.rglob("*"):
        if path.is_file():
            (moved / path.relative_to(variant)).parent.mkdir(parents=True, exist_ok=True)
            (moved / path.relative_to(variant)).write_text(path.read_text().replace(_identity(variant), "0000000"))
    one, two = loaded, packaged_calls.load(moved)
    modules = (one, two, ops)
    for calls in zip(*(packaged_calls.results(module, "torch") for module in modules), strict=True):
        assert torch.equal(calls[0], calls[1]) and torch.equal(calls[0], calls[2])
    names = [module.ops.namespace.add_op_namespace_prefix("") for module in (one, two)]
    assert len({*names, ops.namespace.add_op_namespace_prefix("")}) == 3
    assert set(one.__all__) == {*ops.__all__, "layers"}
    with one.use_backend("reference"):
        assert ops.namespace is not one.ops.namespace and two.TokenSelection is not ops.TokenSelection


def _identity(variant: Path) -> str:
    return json.loads((variant / "metadata.json").read_text())["id"].rpartition("_")[2]


def test_layers_take_the_place_of_others(loaded):
    layers = loaded.layers
    norm = nn.GroupNorm(4, 16)
    norm.forward = layers.GroupNormSiLU.forward.__get__(norm)
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(norm(x), ops.group_norm_silu(x, 4, norm.weight, norm.bias, None, norm.eps))
    plain = nn.LayerNorm(16, eps=1e-6, elementwise_affine=False)
    plain.forward = layers.ModulatedLayerNorm.forward.__get__(plain)
    t, shift, scale, cu = torch.randn(5, 16), torch.randn(2, 16), torch.randn(2, 16), torch.tensor([0, 2, 5]).int()
    assert torch.equal(plain(t, shift, scale, cu), ops.modulated_layer_norm(t, shift, scale, cu))


def test_what_the_builder_refuses(tmp_path):
    with pytest.raises(ValueError, match="imports a module of dcdit by its name"):
        relative("import dcdit.ops", depth=0)
    (tmp_path / "own.txt").write_text("")
    with pytest.raises(ValueError, match="holds something else than a kernel package"):
        build(tmp_path)
    assert relative("from dcdit.ops import (\n    a,\n)\n", 2) == ("from ...ops import (\n    a,\n)\n", [("ops", "a")])
