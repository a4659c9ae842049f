"""`dcdit.kernels` imports from every kind of install and working directory; `import kernels` is left alone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROBE = (
    "import importlib.resources, dcdit.kernels.packing as packing, dcdit.kernels.launch as launch\n"
    "assert launch.shipped_configs()['gather']\n"
    "assert (launch.CONFIG_FOLDER / 'README.md').is_file()\n"
    "assert importlib.resources.files('dcdit.kernels.configs').joinpath('README.md').is_file()\n"
    "print(packing.__file__)"
)


def run(*command: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that builds leave no trace in it."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("dcdit", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "kernels" / "configs" / "Some_GPU.json").write_text("{}")
    return folder


@pytest.mark.parametrize("kind", ["wheel", "editable", "strict"])
def test_kernels_import_from_any_directory(kind: str, source: Path, tmp_path: Path) -> None:
    site = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--without-pip", str(site), cwd=tmp_path)
    python = str(site / "bin" / "python")
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path))
    outer = Path(run(sys.executable, "-c", "import torch; print(torch.__path__[0])", cwd=tmp_path)).parent
    (packages / "outer.pth").write_text(f"{outer}\n")  # torch and triton, without installing them again
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", python, "install", "--no-deps", "--no-build-isolation"]
    if kind == "wheel":
        run(*pip, str(source), cwd=tmp_path)
    elif kind == "editable":
        run(*pip, "-e", str(source), cwd=tmp_path)
    else:
        run(*pip, "-e", str(source), "--config-settings", "editable_mode=strict", cwd=tmp_path)
    expected = packages if kind == "wheel" else source
    for directory in (tmp_path, source, source / "kernels"):
        found = Path(run(python, "-P", "-c", PROBE, cwd=directory))
        assert found.resolve().is_relative_to(expected.resolve()), found
    from_checkout = Path(run(python, "-c", PROBE, cwd=source))
    assert from_checkout.name == "packing.py"


def test_kernels_folder_is_no_package() -> None:
    """A regular package of that name (Hugging Face's) must win over the folder in the checkout."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_carries_configurations(source: Path, tmp_path: Path) -> None:
    build = ("-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source))
    run(sys.executable, *build, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dcdit/kernels/configs/README.md" in names
    assert "dcdit/kernels/configs/Some_GPU.json" in names
    assert {"dcdit/py.typed", "dcdit/sample/page.html"} <= set(names)
    recipes = {path.name for path in (ROOT / "dcdit" / "config" / "recipes").glob("*.yaml")}
    assert {Path(name).name for name in names if name.startswith("dcdit/config/recipes/")} == recipes
    assert not any(name.startswith("kernels/") for name in names)


def test_import_needs_no_extra_and_no_gpu() -> None:
    """`import dcdit` and its operations load neither an extra nor Triton, beyond what torch loads itself."""
    loaded = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import dcdit, dcdit.ops, dcdit.models, dcdit.nn, dcdit.diffusion\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    names = set(run(sys.executable, "-c", loaded, cwd=ROOT).split())
    assert "dcdit" in names
    assert not names & {"triton", "flash_attn", "diffusers", "accelerate", "matplotlib", "skimage", "yaml", "tqdm"}


def test_import_is_quick() -> None:
    """Under two seconds beyond importing torch, in the same process."""
    code = "import time, torch; start = time.process_time(); import dcdit.ops; print(time.process_time() - start)"
    assert min(float(run(sys.executable, "-c", code, cwd=ROOT)) for _ in range(2)) < 2.0
