"""The CIFAR-10 study end to end: fabricated strips, tiny models, a tiny extractor."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.harness.static import CompiledDiT
from benchmarks.studies import (
    cifar10,
    cifar10_gpu,
    composition,
    composition_cpu,
    composition_page,
    selection,
    start,
    training,
)
from dcdit.config import TrainConfig, load_config
from dcdit.models.starts import STARTS
from dcdit.ops import select_tokens
from dcdit.train import train

TINY = {**cifar10.COMMON, "hidden_size": 128, "depth": 1}
FLOPS = 2.5e10


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The npm package with 8 images a strip; the study reads the first 16 of the test batch."""
    folder = tmp_path_factory.mktemp("package")
    rng = np.random.default_rng(0)
    for name, count in {**{f"data_batch_{i}": 8 for i in range(1, 6)}, "test_batch": 48}.items():
        coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse.repeat(8, 1).repeat(8, 2).reshape(count, 1024, 3)).save(folder / f"{name}.png")
    for name, count in (("train_lables", 40), ("test_lables", 48)):
        (folder / f"{name}.json").write_text(json.dumps([i % 10 for i in range(count)]))
    return folder


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(cifar10, "MODELS", {"dc-dit": ("DC-DiT-S", TINY), "static-flops": ("DiT-S/8", TINY)})
    monkeypatch.setattr(cifar10, "HELD_OUT", 16)
    monkeypatch.setattr(cifar10, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(cifar10, "BATCH", 8)
    base = tmp_path / "base.yaml"
    often = "log_every: 1, eval_every: 1, eval_images: 8"
    base.write_text(cifar10.BASE.read_text().replace("log_every: 10, eval_every: 100, eval_images: 128", often))
    assert often in base.read_text()
    monkeypatch.setattr(cifar10, "BASE", base)
    monkeypatch.setattr(cifar10, "train_all", train_here)
    torch.manual_seed(0)
    extractor = Extractor()
    monkeypatch.setattr(cifar10, "load_extractor", lambda path: extractor)
    return tmp_path


class Extractor(torch.nn.Module):
    """Six numbers of an image."""

    identity = "tiny"

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(48, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.nn.functional.avg_pool2d(images.float(), 8).flatten(1))


def train_here(configs: dict[str, TrainConfig], jobs: int, programs: object = None) -> None:
    """In this process: starting two more takes longer than the training."""
    for config in configs.values():
        if not training.finished(config):
            train(config)


def arguments(package: Path, folder: Path) -> list[str]:
    options = {"--data": package, "--inception": "x.pt", "--flops": FLOPS, "--samples": 16, "--reference": 32}
    options |= {"--runs": folder / "runs", "--out": folder / "page"}
    return [str(part) for pair in options.items() for part in pair] + ["--seeds", "0", "--jobs", "2"]


def test_study_trains_measures_and_goes_on(package: Path, tiny: Path) -> None:
    cifar10.main(arguments(package, tiny))
    runs = json.loads((tiny / "page" / "study.json").read_text())["runs"]
    assert set(runs) == {"dc-dit-0", "static-flops-0"}
    for run in runs.values():
        assert run["training_flops"] >= FLOPS
        assert {"FID", "KID"} <= set(run["evaluation"]["figures"])
    assert set(runs["dc-dit-0"]["loss"]) == {"0.0", "0.3", "0.6"}
    assert runs["dc-dit-0"]["gflops"]["0.6"] < runs["dc-dit-0"]["gflops"]["0.0"]
    assert len(runs["dc-dit-0"]["routing"]["kept_share"]) == len(cifar10.NOISE_LEVELS)
    text = (tiny / "page" / "report.md").read_text()
    assert all(seconds > 0 for seconds, _ in runs["dc-dit-0"]["seconds"].values())
    for picture in ("losses.png", "samples.png", "routing.png", "quality.png"):
        assert picture in text
        assert (tiny / "page" / picture).is_file()

    before = {path: path.stat().st_mtime_ns for path in (tiny / "runs").rglob("*.safetensors")}
    cifar10.main(arguments(package, tiny))
    assert {path: path.stat().st_mtime_ns for path in (tiny / "runs").rglob("*.safetensors")} == before


@pytest.fixture
def short(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cifar10, "NOISE_LEVELS", (0.2, 0.8))
    monkeypatch.setattr(cifar10, "DROPS", (0.0,))
    return tiny


def page_of(module: ModuleType, package: Path, folder: Path, *further: str) -> tuple[str, dict[str, Any]]:
    """What a study prints for one seed, and its runs."""
    options = {"--data": package, "--flops": FLOPS, "--runs": folder / "runs", "--out": folder / "page"}
    module.main([str(part) for pair in options.items() for part in pair] + ["--seeds", "0", "--jobs", "1", *further])
    return (folder / "page" / "report.md").read_text(), json.loads((folder / "page" / "study.json").read_text())["runs"]


def test_every_start_is_trained_and_its_branches_are_measured(package: Path, short: Path, monkeypatch) -> None:
    monkeypatch.setattr(start, "train_all", train_here)
    text, runs = page_of(start, package, short)
    assert set(runs) == {f"{name}-0" for name in STARTS}
    for name, run in runs.items():
        residual = run["scales"]["start"]["residual"]
        assert (residual == 0) == (STARTS[name.removesuffix("-0")].residual == "zero")
        assert run["scales"]["start"] != run["scales"]["end"]
        assert f"| {name.removesuffix('-0')} " in text


@pytest.fixture
def composed(package: Path, short: Path, monkeypatch) -> tuple[Path, Path]:
    """The data and the results of tiny models, all of which were trained."""
    for name, (preset, overrides) in composition.MODELS.items():
        layout = {"depth": 1 if preset.startswith("DC") else 5}
        layout |= {"sparse_depth": 1} if preset.startswith("Sparse") else {}
        monkeypatch.setitem(composition.MODELS, name, (preset.replace("/2", "/4"), {**overrides, **layout}))
    base, often = short / "composition.yaml", "log_every: 1, eval_every: 1, eval_images: 2"
    base.write_text(composition.BASE.read_text().replace("log_every: 20, eval_every: 100, eval_images: 256", often))
    assert often in base.read_text()
    settings = {"BASE": base, "BATCH": 2, "GPU_IMAGES": 3, "GPU_COPIES": 2, "GPU_ROUNDS": 2, "GPU_SECONDS": 0}
    for name, value in {**settings, "train_all": train_here}.items():
        monkeypatch.setattr(composition, name, value)
    monkeypatch.setattr(cifar10, "HELD_OUT", 3)
    monkeypatch.setattr(cifar10_gpu, "IMAGES", 40)
    data, out = short / "data.npz", short / "trained"
    cifar10_gpu.main(["data", "--package", str(package), "--out", str(data)])
    arguments = ["--data", str(data), "--runs", str(short / "runs"), "--out", str(out), "--flops", "5e9"]
    composition.main([*arguments, "--device", "cpu", "--seeds", "0"])
    return data, out


def test_methods_that_compose_are_trained_measured_and_timed(composed: tuple[Path, Path], monkeypatch) -> None:
    data, out = composed
    trained = json.loads((out / "trained.json").read_text())
    assert set(trained["runs"]) == {f"{name}-0" for name in composition.MODELS}
    for run in trained["runs"].values():
        assert run["training_flops"] >= 5e9 and len(run["loss_by_level"]["drawn"]) == 2
    gflops = {name: run["gflops"]["drawn"] for name, run in trained["runs"].items()}
    assert gflops["sparsedit-0"] < gflops["static-0"]

    # What is timed on a GPU.
    monkeypatch.setattr(composition, "CompiledDiT", partial(CompiledDiT, backend="eager"))
    planned = composition.configs(data, out.parent / "runs", 5e9, [0], "cpu")
    found = composition.time_on_gpu({name: planned[f"{name}-0"] for name in composition.MODELS})
    assert list(found["sides"]) == [composition.COMPILED, *composition.MODELS] and found["images"] == 6
    assert found["sides"]["static"]["gflops"] == pytest.approx(gflops["static-0"])
    (out / "trained.json").write_text(json.dumps({**trained, "gpu": found}))

    for name, value in {"CPU_IMAGES": 2, "CACHED_STEPS": 4, "SLICED_STEPS": 3}.items():
        monkeypatch.setattr(composition_cpu, name, value)
    page = out.parent / "page"
    composition_page.main(["--data", str(data), "--trained", str(out), "--rounds", "2", "--out", str(page)])
    text = (page / "report.md").read_text()
    for name in composition.MODELS:
        assert text.count(f"| {name} ") == 5  # losses at equal FLOPs and at the end, the summary, times of both devices
    assert "threshold 0.05" in text and "Time on a GPU" in text
    assert (page / "losses.png").is_file() and (page / "study.json").is_file()

    # A run that failed is named, and the others are measured.
    def fail(configs: dict[str, TrainConfig], jobs: int) -> None:
        raise training.RunFailedError("training failed: static-0")

    monkeypatch.setattr(composition, "train_all", fail)
    shutil.rmtree(out.parent / "runs" / "static-0")
    arguments = ["--data", str(data), "--runs", str(out.parent / "runs"), "--out", str(out / "again")]
    with pytest.raises(SystemExit, match="static-0"):
        composition.main([*arguments, "--device", "cpu", "--seeds", "0"])
    assert set(json.loads((out / "again" / "trained.json").read_text())["runs"]) == set(trained["runs"]) - {"static-0"}


def test_a_cell_is_what_the_de_chunk_gives_to_its_token() -> None:
    x = torch.arange(8 * 8, dtype=torch.float32).view(1, 64, 1)
    kept = torch.zeros(1, 64)
    kept[0, [0, 63]] = 1
    means = selection.cell_means(x, select_tokens(kept))
    rows, cols = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    first = (rows + cols <= 7).flatten()  # the diagonal is as far from both; ties go to the first token
    assert torch.allclose(means.flatten(), torch.stack([x[0, first].mean(), x[0, ~first].mean()]))


def test_the_gpu_study_goes_model_by_model_and_its_page_has_all(package: Path, short: Path, monkeypatch) -> None:
    small = {name: (preset, {**overrides, "depth": 1}) for name, (preset, overrides) in cifar10_gpu.MODELS.items()}
    settings = {"MODELS": small, "IMAGES": 20, "SAMPLES": 1600, "BATCH": 800, "MINUTES": 0.2}
    for name, value in settings.items():
        monkeypatch.setattr(cifar10_gpu, name, value)
    monkeypatch.setattr(cifar10_gpu, "load_extractor", lambda path: Extractor())
    monkeypatch.setattr(cifar10, "HELD_OUT", 3)
    data, out = short / "data.npz", short / "gpu"

    def call(verb: str, folder: Path, *options: str) -> None:
        cifar10_gpu.main([verb, "--package", str(package), "--data", str(data), "--out", str(folder), *options])

    with pytest.raises(SystemExit, match="holds no finished run"):
        call("page", out)
    call("data", data)
    for done, name in enumerate(small, start=1):
        call("train", out, "--rehearse")
        assert len(list(out.glob("*.json"))) == done
        assert np.load(out / f"{name}-1.npy").shape == (8, 32, 32, 3)
    before = {path: path.read_bytes() for path in out.iterdir()}
    call("train", out, "--rehearse")
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    call("page", out, "--inception", "x.pt")
    text = (out / "report.md").read_text()
    assert "REHEARSAL" in text
    assert all(f"| {name}-0 " in text for name in small)


def test_a_run_that_fails_is_named(tmp_path: Path) -> None:
    config: TrainConfig = load_config(None, {"run.out": str(tmp_path / "run"), "data.path": str(tmp_path / "nowhere")})
    with pytest.raises(training.RunFailedError, match=r"broken \(see .*run\.out\)"):
        training.train_all({"broken": config}, jobs=1)
    assert "nowhere" in (tmp_path / "run.out").read_text()
