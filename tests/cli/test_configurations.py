"""What ``dcdit train`` says about a configuration without training."""

import json
from dataclasses import fields

import numpy as np
import pytest

from dcdit.cli import main
from dcdit.cli.configurations import annotated, attribute_docs
from dcdit.config import TrainConfig, load_config, recipes
from dcdit.models import DCDiTConfig, DiTConfig, count_flops, create_model

SIZES = {"hidden_size": 128, "depth": 2, "num_heads": 2}


@pytest.fixture
def command(tmp_path):
    """Arguments of a run on twelve images of 8 x 8 pixels."""
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz", images=rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), labels=np.arange(12) % 3
    )
    sizes = f"model.overrides={json.dumps(SIZES)}"
    return [
        "train", "--data", "npz", "--data-path", str(tmp_path / "data.npz"), "--steps", "5", "--batch-size", "4",
        "--out", str(tmp_path / "run"), "--set", sizes, "--set", "router.group_size=4", "--device", "cpu",
    ]  # fmt: skip


def test_list_of_recipes(capsys):
    assert main(["train", "--list-configs"]) == 0
    out = capsys.readouterr().out
    for name in recipes():
        assert any(line.startswith(f"{name} ") for line in out.splitlines())
    assert "DC-DiT-XL" in out and max(map(len, out.splitlines()[: len(recipes())])) <= 120


@pytest.mark.parametrize("name", [None, *recipes()])
def test_printed_configuration_reads_back(name, tmp_path, capsys):
    flags = ["--set", "optim.lr=3e-5", "--set", "model.overrides.depth=30", "--set", "router.group_size=null"]
    assert main(["train", "--print-config", *flags, *([] if name is None else ["--config", name])]) == 0
    text = capsys.readouterr().out
    (tmp_path / "a.yaml").write_text(text)
    given = {"optim.lr": 3e-5, "model.overrides.depth": 30, "router.group_size": None}
    assert load_config(tmp_path / "a.yaml") == load_config(name, given)
    assert max(map(len, text.splitlines())) <= 120


def test_printed_configuration_explains_every_key():
    text = annotated(load_config(None, {"model.image_size": 512, "model.overrides.router": "cosine2d"}))
    unwrapped = " ".join(text.replace("#", " ").split())
    for section in fields(TrainConfig):
        for field in fields(getattr(TrainConfig(), section.name)):
            assert " ".join(field.metadata["doc"].split()) in unwrapped, field.name
    assert "learning rate (float, at least 0, default 0.0001)" in unwrapped
    assert "grid = [64, 64]" in text and 'router = "cosine2d"' in text and "dechunk_sigma = 2.0" in text
    assert "in_channels = as the data" in text
    assert "`" not in text and ":class:" not in text and "DC-DiT-S, -B" in unwrapped
    assert "patch_size = 4" in annotated(load_config(None, {"model.name": "DiT-S/4"}))


@pytest.mark.parametrize("kind", [DCDiTConfig, DiTConfig])
def test_every_field_of_a_model_has_a_meaning(kind):
    docs = attribute_docs(kind)
    assert set(docs) == {field.name for field in fields(kind)} - {"num_classes"}
    assert docs["depth"] == "Transformer blocks."


def test_dry_run(command, tmp_path, capsys):
    """It tells what the run would be, and writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    assert main([*command, "--dry-run"]) == 0
    out = capsys.readouterr().out
    model = create_model("DC-DiT-S", 64, 3, in_channels=3, **SIZES)
    parameters = sum(p.numel() for p in model.parameters())
    image = count_flops(model.config, 16)["total"]
    assert f"npz: 3 x 8 x 8, 3 classes\nmodel   DC-DiT-S: {parameters / 1e6:.4g} M parameters\n" in out
    assert f"{image / 1e9:.4g} GFLOPs per image and forward pass with 16 kept tokens" in out
    assert f"{5 * 4 * 3 * image:.3g} FLOPs in all" in out and f"{tmp_path / 'run'}: free" in out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--set model.image_size=128", "the data has shape (3, 8, 8), the model takes (3, 16, 16)"),
        ("--set router.group_size=3", "router.group_size is 3; accepted: a divisor of the 4 images"),
        ("--data-path nowhere.npz", "nowhere.npz"),
        ("--out {taken}", "already holds config.yaml; choose another --out"),
        ("--print-config", "not allowed with argument"),
    ],
)
def test_dry_run_finds_what_would_stop_the_run(command, tmp_path, capsys, flags, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").write_text("of another run")
    assert main([*command, "--dry-run", *flags.format(taken=tmp_path / "taken").split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_published_recipe_runs_on_a_stream(tmp_path, capsys):
    """Only keys of data change. What the columns do not say comes from the model: 1000 classes."""
    from support.shards import write_parquet

    rows = [{"latent": np.zeros((4, 32, 32), np.float32).tolist(), "label": 999}] * 2
    for shard in range(2):
        write_parquet(tmp_path / "shards" / f"{shard}.parquet", rows)
    data = ["--data", "stream", "--data-path", str(tmp_path / "shards"), "--out", str(tmp_path / "run")]
    assert main(["train", "--config", "dc-dit-s-256", *data, "--dry-run"]) == 0
    assert "stream: 4 x 32 x 32, 1000 classes" in capsys.readouterr().out


def test_dry_run_of_a_resumed_run(command, tmp_path, capsys):
    assert main(command) == 0
    capsys.readouterr()
    run = str(tmp_path / "run")
    assert main(["train", "--resume", run, "--steps", "9", "--dry-run"]) == 0
    assert f"{run}: goes on" in capsys.readouterr().out
    assert main(["train", "--resume", run, "--print-config"]) == 0
    assert "steps: 5" in capsys.readouterr().out
