"""``dcdit extract`` on the command line: from images to a trained model, and errors in one line."""

import json
import subprocess
import sys

import pytest
from support.autoencoder import SIZE, flip_last_bit, save_autoencoder, write_images
from support.programs import environment

from dcdit.checkpoint import read_metadata
from dcdit.cli import main
from dcdit.data.latents.encode import encode_images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    pytest.importorskip("diffusers")
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


def test_from_images_to_a_trained_model(images, vae, tmp_path, capsys):
    out = tmp_path / "2024"
    command = ["extract", "--images", images, "--vae", vae, "--out", out, "--size", SIZE, "--workers", 0]
    assert main([str(word) for word in [*command, "--device", "cpu"]]) == 0
    printed = capsys.readouterr().out
    assert "7 latents (4, 8, 8) in 1 shards" in printed and printed.endswith(f"--data-path {out}\n")
    assert main(["extract", "--verify", str(out)]) == 0
    sets = ["in_channels=4", "grid=[8,8]", "hidden_size=128", "depth=1", "num_heads=2"]
    sets = [f"model.overrides.{item}" for item in sets] + ["model.num_classes=2", "router.group_size=null"]
    train = ["train", "--data", "latents", "--data-path", out, "--steps", 2, "--batch-size", 2, "--device", "cpu"]
    train += ["--out", tmp_path / "run", *(word for item in sets for word in ("--set", item))]
    assert main([str(word) for word in train]) == 0
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert json.loads(read_metadata(tmp_path / "run")["latent_range"]) == [[0.1], [0.5]]
    sample = [
        "sample",
        "--checkpoint",
        tmp_path / "run",
        "--vae",
        vae,
        "--steps",
        2,
        "--device",
        "cpu",
        "--out",
        tmp_path,
    ]
    assert main([str(word) for word in sample]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_two_processes_make_the_files_of_one(images, vae, tmp_path):
    options = ["--vae", vae, "--size", SIZE, "--shard-size", 3, "--batch-size", 2, "--workers", 0, "--device", "cpu"]
    words = [sys.executable, "-m", "support.ranks", "2", "extract", "--images", images, *options, "--out", tmp_path]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment())
    assert done.stdout.splitlines()[-1] == "[0, 0]", done.stderr
    assert done.stdout.count("7 latents (4, 8, 8) in 3 shards") == 1
    alone = tmp_path.with_name("alone")
    encode_images(images, vae, alone, size=SIZE, batch_size=2, shard_size=3, device="cpu")
    one, two = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (alone, tmp_path))
    assert one == two


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--images {images} --vae {vae}", "--out is missing; accepted: --images, --vae and --out, or --verify"),
        ("--images {images} --vae {images} --out {tmp}", "no diffusers autoencoder (config.json)"),
        ("--images {tmp} --vae {vae} --out {tmp}", "no images in"),
        ("--images {images} --vae {vae} --out {tmp} --size 15", "size is 15; accepted: a multiple of 2"),
        ("--images {images} --vae {vae} --out {tmp} --batch-size 0", "--batch-size is 0; accepted: at least 1"),
        ("--verify {tmp}", "no manifest.json in"),
    ],
)
def test_errors_are_one_line(images, vae, tmp_path, capsys, arguments, message):
    words = ["extract", *arguments.format(images=images, vae=vae, tmp=tmp_path).split()]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("dcdit: error: ") and error.count("\n") == 1 and message in error


def test_verify_fails_on_the_command_line(images, vae, tmp_path, capsys):
    encode_images(images, vae, tmp_path, size=SIZE, batch_size=2, shard_size=3)
    flip_last_bit(tmp_path / "latents_shard00002.safetensors")
    assert main(["extract", "--verify", str(tmp_path)]) == 2
    assert "latents_shard00002.safetensors has another SHA-256" in capsys.readouterr().err.splitlines()[-1]
