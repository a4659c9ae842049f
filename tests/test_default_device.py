"""PyTorch's default device, which a notebook may have set, changes nothing for tensors that are on another one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small import batch, small_dc_dit, small_dit, small_dy_dit, small_dynamic_dc_dit, small_sparse_dit
from torch import Tensor

import dcdit
from dcdit.checkpoint import save_model
from dcdit.config import load_config
from dcdit.diffusion import create_objective, parse_drop_schedule, sample
from dcdit.models import SlicedModel, count_flops
from dcdit.profiling.calibrate import varied_latents
from dcdit.profiling.workloads import OPERATIONS, Shape, create_workload
from dcdit.sample import Guidance, measure_costs, measure_kept_share
from dcdit.sample.drawing import class_labels
from dcdit.train import loop, train

MODELS: dict[str, Callable[[], Any]] = {
    "DC-DiT": small_dc_dit,
    "dithered": lambda: small_dc_dit(router="dithered", cell_context=True),
    "uniform": lambda: small_dc_dit(router="uniform"),
    "ema": lambda: small_dc_dit(router="cosine1d", dechunk="ema"),
    "width": small_dynamic_dc_dit,
    "DiT": small_dit,
    "DyDiT": small_dy_dit,
    "SparseDiT": small_sparse_dit,
}
LABELS = torch.arange(3)


def plain(value: Any) -> Any:
    """Tensors as numbers, also those in a mapping or a tuple."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [plain(part) for part in value]
    return value.tolist() if isinstance(value, Tensor) else value


def assert_same(call: Callable[[], Any]) -> None:
    """Nothing can be computed on the device "meta", so what is made on the default device by mistake is found."""
    expected = plain(call())
    with torch.device("meta"):
        assert plain(call()) == expected


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_and_is_counted(name: str) -> None:
    model = MODELS[name]()
    inputs = batch(model.config)
    with torch.no_grad():
        assert_same(lambda: model(*inputs))
    assert_same(lambda: count_flops(model.config))
    assert_same(lambda: sample(model, LABELS, 2, "ddpm", cfg_scale=1.5, progress=False))


def test_budgets() -> None:
    model, wide = small_dc_dit(), small_dynamic_dc_dit()
    drops = (parse_drop_schedule("linear:0.6:0.1"), 0.9)
    options: dict[str, Any] = {"cfg_scale": 1.5, "cfg_interval": (0.1, 0.7), "progress": False}
    assert_same(lambda: sample(model, LABELS, 3, "ddim", drop_fraction=drops, **options))
    assert_same(lambda: measure_costs(model, LABELS, 3, "ddim", Guidance(1.5), progress=False)[0].costs)
    assert_same(lambda: measure_kept_share(model, LABELS, 3, "ddim", Guidance(1.5), progress=False))
    x, t, y = batch(wide.config)
    assert_same(lambda: SlicedModel(wide, [10.0, float(t[0])])(x, t[:1].expand(len(t)), y).detach())
    assert_same(lambda: class_labels(10, [3, 1], 1, 3))


@pytest.mark.parametrize("name", ["flow", "dit"])
def test_objectives(name: str) -> None:
    model, (x, _, y) = small_dc_dit(), batch(small_dc_dit().config)
    objective = create_objective(name, learn_sigma=True)
    assert_same(lambda: objective(model, x, y, generator=torch.Generator("cpu").manual_seed(0))["loss"].detach())


def test_what_profiles_run_on() -> None:
    shape = Shape(2, (4, 4), 32, 0.3, torch.float32, torch.device("cpu"))
    assert_same(lambda: varied_latents(2, 4, (8, 8)))
    for name in OPERATIONS:
        assert_same(lambda name=name: create_workload(name, shape).arguments)


def test_pictures_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_model(file, small_dc_dit(), notes={"objective": "dit"})

    def draw() -> torch.Tensor:
        generator = dcdit.load(file, device="cpu", class_names=[str(n) for n in range(10)])
        return generator.generate([1, "2"], num_steps=2, capacity="auto", output_type="latent", progress=False)

    assert_same(draw)


def test_training_draws_its_weights_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Built(Exception):
        pass

    def note_device(**_: Any) -> None:
        raise Built(torch.empty(0).device.type)

    monkeypatch.setattr(loop, "create_model", note_device)
    config = load_config("photographs-cpu", {"run.out": str(tmp_path / "run"), "optim.device": "cpu", "data.size": 4})
    with torch.device("meta"), pytest.raises(Built, match="cpu"):
        train(config)
