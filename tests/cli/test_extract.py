"""``dcdit extract`` with an untrained autoencoder: what it writes, that it goes on where it stopped, found damage."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dcdit.checkpoint import read_metadata
from dcdit.cli.main import main
from dcdit.data import LatentDataset
from dcdit.data.autoencoder import create_decoder
from dcdit.data.folder import read_centre
from dcdit.data.latents.encode import encode_images, verify_shards

SIZE = 16
PER_CLASS = (4, 3)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, count in zip(("birds", "cats"), PER_CLASS, strict=True):
        (path / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (SIZE + 4 * i, 2 * SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / name / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """An untrained autoencoder of stride 2 with a shift, whose posterior is wide enough to see the noise."""
    diffusers = pytest.importorskip("diffusers")
    path = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.5, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    autoencoder.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def extracted(images, vae, tmp_path_factory):
    """Seven images in shards of three."""
    out = tmp_path_factory.mktemp("latents") / "out"
    return out, encode_images(images, vae, out, size=SIZE, batch_size=2, shard_size=3)


@pytest.fixture
def copied(extracted, tmp_path):
    return shutil.copytree(extracted[0], tmp_path / "copy")


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def flip_last_bit(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


# --- what is written ----------------------------------------------------------------------------------------------


def test_latents_are_draws_from_the_posterior_of_each_image_and_its_mirror_image(extracted, images, vae):
    from diffusers import AutoencoderKL

    out, manifest = extracted
    assert manifest.images == manifest.done == 7 and [s.images for s in manifest.shards] == [3, 3, 1]
    autoencoder = AutoencoderKL.from_pretrained(vae).eval()
    files = sorted(images.glob("*/*.png"))
    stored = {}
    for shard in manifest.shards:
        with safe_open(out / shard.file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                stored.setdefault(name, []).append(opened.get_tensor(name))
    stored = {name: torch.cat(parts) for name, parts in stored.items()}
    assert stored["labels"].tolist() == [0] * 4 + [1] * 3 and stored["labels"].dtype == torch.int64
    noise = []
    for number, file in enumerate(files):
        pixels = torch.from_numpy(read_centre(file, SIZE).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        for name, x in (("latents", pixels), ("latents_flip", pixels.flip(-1))):
            with torch.no_grad():
                posterior = autoencoder.encode(x).latent_dist
            noise.append(((stored[name][number] - posterior.mean[0]) / posterior.std[0]).flatten())
    noise = torch.stack(noise)  # [image and mirror image, C * h * w]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert (noise.corrcoef() - torch.eye(14)).abs().max() < 0.3


def test_a_model_sees_the_range_of_the_autoencoder(extracted):
    out, manifest = extracted
    assert (manifest.shift, manifest.scale) == (0.1, 0.5)
    seen, stored = (LatentDataset(out, held_out=0, flip=False, scale=scale) for scale in (None, 1.0))
    assert seen.shape == (4, 8, 8) and seen.class_names == ("birds", "cats")
    for n in range(7):
        torch.testing.assert_close(seen[n][0], (stored[n][0] - 0.1) * 0.5)
        assert seen[n][1] == stored[n][1]


@pytest.mark.parametrize("how", ["manifest", "statistics", "scale"])
def test_what_a_model_sees_is_undone_before_decoding(copied, vae, how):
    from diffusers import AutoencoderKL

    if how == "statistics":
        (copied / "manifest.json").unlink()
    data = LatentDataset(copied, held_out=0, flip=False, scale=3.0 if how == "scale" else None)
    decode = create_decoder(vae, 4, torch.device("cpu"), data.notes)
    with torch.no_grad():
        z = LatentDataset(copied, held_out=0, flip=False, scale=1.0)[2][0]
        expected = AutoencoderKL.from_pretrained(vae).eval().decode(z[None]).sample
    torch.testing.assert_close(decode(data[2][0][None]), expected)


def test_statistics_are_those_of_all_latents(extracted):
    out, _ = extracted
    latents = torch.stack([LatentDataset(out, held_out=0, flip=False, scale=1.0)[n][0] for n in range(7)])
    statistics = torch.load(out / "latents_stats.pt", weights_only=True)
    torch.testing.assert_close(statistics["mean"], latents.mean((0, 2, 3), keepdim=True))
    torch.testing.assert_close(statistics["std"], latents.std((0, 2, 3), keepdim=True))


def test_lightningdit_can_read_it(copied):
    """Its loader takes every *.safetensors in the folder, and the statistics; so does ours without the manifest."""
    (copied / "manifest.json").unlink()
    x = torch.stack([LatentDataset(copied, held_out=0, flip=False)[n][0] for n in range(7)])
    assert x.mean((0, 2, 3)).abs().max() < 1e-5 and (x.std((0, 2, 3)) - 1).abs().max() < 1e-5


def test_bf16_stores_half_precision(extracted, images, vae, tmp_path):
    encode_images(images, vae, tmp_path, size=SIZE, precision="bf16")
    with safe_open(tmp_path / "latents_shard00000.safetensors", framework="pt") as opened:
        assert opened.get_tensor("latents").dtype == torch.float16
    half, full = (LatentDataset(path, held_out=0, flip=False, scale=1.0) for path in (tmp_path, extracted[0]))
    error = torch.stack([half[n][0] - full[n][0] for n in range(7)])
    assert 0 < error.square().mean().sqrt() < 0.02


# --- going on -----------------------------------------------------------------------------------------------------


def test_stopped_and_continued_is_the_same_bit_for_bit(extracted, images, vae, tmp_path, monkeypatch):
    monkeypatch.setattr("dcdit.utils.files.os.getpid", lambda: 12345)  # another process
    broken = shutil.copytree(images, tmp_path / "images")
    good = (broken / "cats" / "1.png").read_bytes()
    (broken / "cats" / "1.png").write_bytes(good[:100])
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"cannot read image '.*cats/1\.png'"):
        encode_images(broken, vae, out, size=SIZE, batch_size=2, shard_size=3)
    (done,) = out.glob("*.safetensors")
    written = done.stat().st_mtime_ns
    with pytest.raises(ValueError, match="out holds 3 of 7 images; dcdit extract goes on where it stopped"):
        LatentDataset(out)
    assert verify_shards(out) == ["4 images are not done yet"]

    (broken / "cats" / "1.png").write_bytes(good)
    encode_images(broken, vae, out, size=SIZE, batch_size=2, shard_size=3, workers=1)
    assert done.stat().st_mtime_ns == written
    assert contents(out) == contents(extracted[0])


def test_only_what_is_missing_is_made_anew(extracted, images, vae, copied):
    (copied / "latents_shard00001.safetensors").unlink()
    others = {file: file.stat().st_mtime_ns for file in copied.glob("*.safetensors")}
    encode_images(images, vae, copied, size=SIZE, batch_size=2, shard_size=3)
    assert contents(copied) == contents(extracted[0])
    assert all(file.stat().st_mtime_ns == written for file, written in others.items())


@pytest.mark.parametrize(
    ("option", "name"), [({"size": 32}, "shape"), ({"seed": 1}, "seed"), ({"shard_size": 4}, "shard_size")]
)
def test_another_recipe_is_refused(images, vae, copied, option, name):
    with pytest.raises(ValueError, match=f"copy holds latents with another {name} .*choose another --out"):
        encode_images(images, vae, copied, **{"size": SIZE, "batch_size": 2, "shard_size": 3, **option})


def test_other_weights_and_other_images_are_refused(images, vae, copied, tmp_path):
    from diffusers import AutoencoderKL

    autoencoder = AutoencoderKL.from_pretrained(vae)
    torch.nn.init.ones_(autoencoder.quant_conv.bias)
    autoencoder.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="another vae_weights"):
        encode_images(images, tmp_path / "vae", copied, size=SIZE, shard_size=3)
    renamed = shutil.copytree(images, tmp_path / "renamed")
    (renamed / "cats" / "2.png").rename(renamed / "cats" / "9.png")
    with pytest.raises(ValueError, match="another image_list"):
        encode_images(renamed, vae, copied, size=SIZE, shard_size=3)


def test_foreign_shards_are_left_alone(images, vae, copied):
    (copied / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"is not of dcdit extract .*choose another --out"):
        encode_images(images, vae, copied, size=SIZE)


# --- damage -------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_by_verify(copied):
    assert verify_shards(copied) == []
    flip_last_bit(copied / "latents_shard00001.safetensors")
    LatentDataset(copied)
    (problem,) = verify_shards(copied)
    assert problem.endswith("latents_shard00001.safetensors has another SHA-256 than the manifest says")


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_shard_of_another_size_is_found_at_once(copied, damage):
    file = copied / "latents_shard00000.safetensors"
    file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"latents_shard00000\.safetensors .* \(shard 1 of 3, 3 images\)"):
        LatentDataset(copied)
    with pytest.warns(UserWarning, match=r"skipped: .*latents_shard00000\.safetensors .*shard 1 of 3, 3 images"):
        data = LatentDataset(copied, held_out=0, skip_damaged=True)
    assert [label for _, label in sorted((data.split.item(n), data[n][1]) for n in range(4))] == [0, 1, 1, 1]
    assert len(verify_shards(copied)) == 1


@pytest.mark.parametrize("text", ["", "{}", '{"format": "other"}', "[]"])
def test_unreadable_manifest(copied, text):
    (copied / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is not readable"):
        LatentDataset(copied)


# --- command line -------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--images {images} --vae {vae}", "--out is missing; accepted: --images, --vae and --out, or --verify"),
        ("--images {images} --vae {images} --out {tmp}", "no diffusers autoencoder (config.json)"),
        ("--images {tmp} --vae {vae} --out {tmp}", "no images in"),
        ("--images {images} --vae {vae} --out {tmp} --size 15", "size is 15; accepted: a multiple of 2"),
        ("--images {images} --vae {vae} --out {tmp} --batch-size 0", "batch_size is 0; accepted: at least 1"),
        ("--verify {tmp}", "no manifest.json in"),
    ],
)
def test_errors_are_one_line(images, vae, tmp_path, capsys, arguments, message):
    words = ["extract", *arguments.format(images=images, vae=vae, tmp=tmp_path).split()]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("dcdit: error: ") and error.count("\n") == 1 and message in error


def test_verify_fails_on_the_command_line(copied, capsys):
    flip_last_bit(copied / "latents_shard00002.safetensors")
    assert main(["extract", "--verify", str(copied)]) == 2
    assert "latents_shard00002.safetensors has another SHA-256" in capsys.readouterr().err.splitlines()[-1]
