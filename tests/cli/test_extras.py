"""A module that is missing is named with an extra that installs it, and no command needs more than it uses."""

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from support.small import small_dc_dit

import dcdit
from dcdit.checkpoint import save_model
from dcdit.cli.extras import EXTRAS, missing
from dcdit.cli.main import main

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit-image", "sklearn": "scikit-learn"}
"""Where the name of the package is not that of the module."""
THROUGH_OTHERS = {"huggingface_hub": "diffusers", "pyarrow": "datasets"}
"""Installed by a package of the extra."""
SAID_ELSEWHERE = {"flash_attn", "flash_attn_interface", "torch_fidelity", "torchvision", "triton", "safetensors"}
"""Optional, with a message of its own; or a dependency of every installation."""


def distributions(requirements):
    return {re.split(r"[\[<>=; ]", requirement)[0].lower() for requirement in requirements}


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_extras_install_what_they_are_said_to_install(extra):
    found = distributions(PROJECT["optional-dependencies"][extra])
    if "dcdit" in found:
        found |= distributions(PROJECT["optional-dependencies"]["train"])
    wanted = [THROUGH_OTHERS.get(module, DISTRIBUTIONS.get(module, module)) for module in EXTRAS[extra]]
    assert set(wanted) <= found


def test_every_optional_import_has_an_extra():
    core = distributions(PROJECT["dependencies"]) | {"dcdit"}
    known = {module for modules in EXTRAS.values() for module in modules} | SAID_ELSEWHERE | core
    for path in (ROOT / "dcdit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found = {name.partition(".")[0] for name in names}
            assert found <= known | sys.stdlib_module_names, f"{path} imports {found}"


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("PIL.Image", "evaluate", "eval"),
        ("PIL", "train", "train"),
        ("PIL", None, "train"),
        ("diffusers", "evaluate", "train"),
        ("tqdm.auto", "tune", "train"),
        ("tqdm", "demo", "demo"),
        ("torchmetrics", "evaluate", "eval"),
        ("matplotlib", "sample", "demo"),
    ],
)
def test_hints(module, command, extra):
    assert missing(module, command) == f"{module.partition('.')[0]} is not installed: pip install 'dcdit[{extra}]'"
    assert missing("os.path", command) is None


@pytest.fixture
def without(monkeypatch):
    """An installation without a package."""

    def without(package):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return without


def test_profile_prints_its_tables_without_matplotlib(without, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model("model.safetensors", small_dc_dit(hidden_size=128, depth=1, grid=(8, 8)))
    without("matplotlib")
    command = "profile --checkpoint model.safetensors --device cpu --batch 1 --seconds 0.01 --drop-fraction 0 --out p"
    assert main(command.split()) == 0
    out = capsys.readouterr().out
    assert "| model" in out or "| variant" in out
    assert out.splitlines()[-1] == (
        "left out profile.png, because matplotlib is not installed: pip install 'dcdit[demo]'"
    )
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["profile.json"]
    assert json.loads((tmp_path / "p" / "profile.json").read_text())["variants"]


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("demo --out demo", "matplotlib", "demo"),
        ("demo --out demo", "sklearn", "demo"),
        ("demo --data photographs --out demo", "skimage", "demo"),
        ("evaluate --images images.npz --extractor net.pt", "torchmetrics", "eval"),
    ],
)
def test_what_is_missing_is_found_before_the_work(without, tmp_path, monkeypatch, capsys, command, package, extra):
    monkeypatch.chdir(tmp_path)
    without(package)
    assert main(command.split()) == 2
    assert capsys.readouterr().err == f"dcdit: error: {package} is not installed: pip install 'dcdit[{extra}]'\n"
    assert not list(tmp_path.iterdir())


def test_pictures_without_pillow_are_refused_before_the_work(without, tmp_path, monkeypatch, capsys):
    """In Python the message names the extra, too. What is no picture can be drawn."""
    monkeypatch.chdir(tmp_path)
    save_model("a.safetensors", small_dc_dit(in_channels=3, grid=(8, 8), hidden_size=128, depth=1))
    without("PIL")
    monkeypatch.delitem(sys.modules, "dcdit.utils.pillow", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr("dcdit.sample.drawing.sample", None)
        assert main(["sample", "--checkpoint", "a.safetensors", "--device", "cpu", "--steps", "1"]) == 2
        assert capsys.readouterr().err == "dcdit: error: PIL is not installed: pip install 'dcdit[train]'\n"
        generator = dcdit.load("a.safetensors", device="cpu")
        with pytest.raises(ModuleNotFoundError, match=r"pictures need Pillow: pip install 'dcdit\[train\]'"):
            generator.generate(0, num_steps=1)
    assert generator.generate(0, num_steps=1, output_type="pt", progress=False).shape == (1, 3, 8, 8)
