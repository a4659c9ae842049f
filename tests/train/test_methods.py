"""Every method by the name of its recipe: trained, saved, sampled, and its stages profiled."""

import json

import pytest
import torch

from dcdit import checkpoint
from dcdit.cli import main
from dcdit.config import load_config
from dcdit.models import count_flops

SMALL = {"hidden_size": 64, "depth": 5, "num_heads": 4}
RECIPES = {
    "dydit-s-256": SMALL,
    "dc-dit-width-s-256": {**SMALL, "hidden_size": 128, "depth": 1},
    "sparsedit-s-256": {**SMALL, "modules": 1, "sparse_depth": 1},
    "sparsedit-routed-s-256": {**SMALL, "modules": 1, "sparse_depth": 1},
}
GROUPS = {"router.group_size": 2, "width.group_size": 2, "run.eval_every": 0, "data.workers": 0}


@pytest.mark.parametrize("recipe", RECIPES)
def test_from_a_recipe_to_a_profile(recipe, archive, tmp_path):
    run = tmp_path / "run"
    sizes = {f"model.overrides.{name}": value for name, value in RECIPES[recipe].items()}
    sets = {"model.image_size": 64, "model.num_classes": 3, "model.overrides.in_channels": 3, **sizes, **GROUPS}
    changes = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    data = ["--data", "npz", "--data-path", str(archive), "--steps", "2", "--batch-size", "4", "--precision", "fp32"]
    assert main(["train", "--config", recipe, *data, "--device", "cpu", "--out", str(run), *changes]) == 0
    model, section = checkpoint.load_model(run), load_config(recipe).model
    assert type(model).__name__ == section.name.partition("-S")[0].replace("-", "")
    assert all(getattr(model.config, name) == value for name, value in section.overrides.items())
    spent = checkpoint.read_trainer(run)["flops"]
    assert 0 < spent <= 2 * 4 * 2 * 3 * count_flops(model.config)["total"]

    # The file holds what the model computes.
    checkpoint.save_model(tmp_path / "again.safetensors", model)
    inputs = torch.randn(2, 3, 8, 8), torch.full((2,), 500), torch.tensor([0, 1])
    with torch.no_grad():
        assert torch.equal(checkpoint.load_model(tmp_path / "again.safetensors")(*inputs), model(*inputs))
    assert main(["sample", "--checkpoint", str(run), "--steps", "2", "--out", str(tmp_path / "drawn")]) == 0

    # A new model of that configuration, with as many open gates and tokens as --keep says.
    options = ["--batch", "2", "--seconds", "0.01", "--device", "cpu", "--out", str(tmp_path / "profile")]
    assert main(["profile", "--config", str(run / "config.yaml"), *options]) == 0
    static, *_, dynamic = json.loads((tmp_path / "profile" / "profile.json").read_text())["variants"]
    assert 0 < dynamic["gflops"] < static["gflops"]
    assert dynamic["stage_ms"]["transformer"] > 0 and dynamic["stage_gflops"]["transformer"] > 0
