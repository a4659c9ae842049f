"""What is packaged, and that `dcdit.kernels` imports from every kind of install and working directory."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import dcdit

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
    ignored = shutil.ignore_patterns(*Path(ROOT, ".gitignore").read_text().replace("/", "").split(), ".*")
    shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True)
    (folder / "kernels" / "configs" / "Some_GPU.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with the sdist and the wheel of a release, and what was printed while they were built."""
    out = tmp_path_factory.mktemp("dist")
    code = f"import setuptools.build_meta as b; b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "DCDIT_REPOSITORY": "https://host/owner/name/"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return out, done.stdout


def wheel_names(built: tuple[Path, str]) -> list[str]:
    (wheel,) = built[0].glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def files(folder: Path, *suffixes: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in suffixes}


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


def test_ci_compiles_with_the_oldest_and_newest_and_tests_with_an_accepted_triton() -> None:
    def pinned(file: str) -> Version:
        (version,) = re.findall(r"^triton==([\w.]+)", Path(ROOT, file).read_text(), re.MULTILINE)
        return Version(version)

    project = tomllib.loads(Path(ROOT, "pyproject.toml").read_text())["project"]
    (accepted,) = [r.specifier for r in map(Requirement, project["dependencies"]) if r.name == "triton"]
    (lowest,) = [Version(bound.version) for bound in accepted if bound.operator == ">="]
    (bound,) = [Version(bound.version) for bound in accepted if bound.operator == "<"]
    newest = pinned(".ci/newest-triton.txt")
    assert pinned(".ci/oldest-triton.txt") == lowest
    assert newest in accepted and Version(f"{newest.major}.{newest.minor + 1}") == bound
    assert pinned("constraints.txt") in accepted
    assert pinned(".ci/requirements.txt") == pinned("constraints.txt")


def test_a_build_warns_of_nothing(built: tuple[Path, str]) -> None:
    assert "absent from the" not in built[1]
    assert not re.findall(r"\w*Warning\b.*", built[1])


def test_the_wheel_holds_the_package_and_nothing_else(built: tuple[Path, str], source: Path) -> None:
    kinds = (".py", ".yaml", ".typed", ".html")
    package = {f"dcdit/{name}" for name in files(source / "dcdit", *kinds)}
    kernels = {f"dcdit/kernels/{name}" for name in files(source / "kernels", ".py", ".json", ".md")}
    assert "dcdit/kernels/configs/Some_GPU.json" in kernels
    assert {name for name in wheel_names(built) if ".dist-info/" not in name} == package | kernels


def test_the_sdist_holds_the_whole_checkout(built: tuple[Path, str], source: Path) -> None:
    """So that it can be built, tested and read from alone."""
    (sdist,) = built[0].glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kinds = (".py", ".md", ".yaml", ".yml", ".json", ".png", ".gif", ".webp", ".npz", ".ipynb", ".txt", ".toml", ".cff")
    here = {name for name in files(source, *kinds) if not name.startswith(("build/", "dcdit.egg-info/"))}
    assert here - names == set()


def test_links_of_the_description_lead_to_the_repository(built: tuple[Path, str]) -> None:
    """A package index shows the README, and knows nothing of the files beside it."""
    (wheel,) = built[0].glob("*.whl")
    (name,) = (name for name in wheel_names(built) if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(zipfile.ZipFile(wheel).read(name))
    urls = dict(entry.split(", ") for entry in metadata.get_all("Project-URL"))
    tag = f"v{dcdit.__version__}"
    assert urls["Source"] == "https://host/owner/name"
    assert urls["Changelog"] == f"https://host/owner/name/blob/{tag}/CHANGELOG.md"
    readme, text = (ROOT / "README.md").read_text(), metadata.get_payload(decode=True).decode()
    link = re.compile(r'(?:\]\(|src="|href=")([^)"\s]+)')
    relative = [target for target in link.findall(readme) if not target.startswith(("https://", "#"))]
    assert len(relative) > 10
    assert all(target.startswith(("https://", "#")) for target in link.findall(text))
    for target in relative:
        kind = "raw" if target.endswith((".png", ".gif", ".webp")) else "blob"
        assert f"https://host/owner/name/{kind}/{tag}/{target}" in text
        assert (ROOT / target.partition("#")[0]).exists()


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dcdit.__version__
    assert f"version = {{{dcdit.__version__}}}" in (ROOT / "docs" / "releases.md").read_text()
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2603.06351"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


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
