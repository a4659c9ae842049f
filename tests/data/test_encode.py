"""Making latents with an untrained autoencoder: what is written, that it continues where it stopped, found damage."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from support.autoencoder import SIZE, flip_last_bit, save_autoencoder, write_images

from dcdit.data import LatentDataset
from dcdit.data.autoencoder import create_decoder, load_autoencoder
from dcdit.data.folder import read_centre
from dcdit.data.latents.encode import encode_images, verify_shards


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    pytest.importorskip("diffusers")
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.mark.parametrize("size", ["5KB", "1GB"])
def test_a_variant_of_an_autoencoder(vae, tmp_path, size):
    """Weights stored in half precision, in shards or not. They are computed with in float32."""
    plain = load_autoencoder(vae, torch.device("cpu"))
    plain.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    again = load_autoencoder(tmp_path, torch.device("cpu"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in plain.state_dict().items())
    plain.half().save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    stored = load_autoencoder(tmp_path, torch.device("cpu")).state_dict()
    assert {value.dtype for value in stored.values()} == {torch.float32}


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


def test_shards_of_stopped_processes_are_kept(extracted, images, vae, tmp_path):
    """The first of three processes finishes shard 0 and waits in vain; of two more, one finishes shard 2."""
    options = {"size": SIZE, "batch_size": 2, "shard_size": 3}
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="out holds 3 of 7 images; run the same command again"):
        encode_images(images, vae, out, **options, rank=0, world=3)
    assert encode_images(images, vae, out, **options, rank=1, world=2) is None
    assert (out / "latents_shard00002.entry.json").is_file()
    written = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert len(written) == 2
    with pytest.raises(ValueError, match="out holds 3 of 7 images; dcdit extract goes on where it stopped"):
        LatentDataset(out)
    encode_images(images, vae, out, **options)
    assert all(file.stat().st_mtime_ns == time for file, time in written.items())
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


def test_a_manifest_names_no_file_outside_of_its_folder(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    shard = manifest["shards"][0]
    shutil.move(copied / shard["file"], copied.parent)
    shard["file"] = f"../{shard['file']}"
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"manifest\.json is not readable: it lists '\.\./latents_shard00000\.safetensors'; accepted: "
    ):
        LatentDataset(copied)


@pytest.mark.parametrize("text", ["", "{}", '{"format": "other"}', "[]"])
def test_unreadable_manifest(copied, text):
    (copied / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is (not readable|damaged or no JSON)"):
        LatentDataset(copied)
