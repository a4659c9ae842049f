"""Latents on disk: every file format gives what was stored, at random, in any process; what is damaged is named."""

import json
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dcdit.config import DataSection, override
from dcdit.data import LatentDataset, batches, create_dataset
from dcdit.train import train

COUNT, SHAPE = 12, (4, 8, 8)
LABELS = np.arange(COUNT) % 3


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(0).normal(size=(COUNT, *SHAPE)).astype(np.float32)


def write_pairs(path, latents):
    """fast-DiT and the official DC-DiT: names without leading zeros, arrays with a batch of one."""
    for name, rows in (("features", latents), ("labels", LABELS)):
        (path / f"imagenet256_{name}").mkdir(parents=True)
        for i, row in enumerate(rows):
            np.save(path / f"imagenet256_{name}" / f"{i}.npy", row[None])


def moment_files(latents, spread):
    """EDM2 and REPA."""
    names = [f"0000{i // 10}/img-mean-std-{i:08d}.npy" for i in range(COUNT)]
    arrays = dict(zip(names, np.concatenate([latents, np.full_like(latents, spread)], axis=1), strict=True))
    return arrays, {"labels": [[name, int(label)] for name, label in zip(names, LABELS, strict=True)][::-1]}


def write_moments(path, latents, spread=0.0):
    arrays, index = moment_files(latents, spread)
    for name, array in arrays.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(path / name, array)
    (path / "dataset.json").write_text(json.dumps(index))


def write_zip(path, latents, spread=0.0, compression=zipfile.ZIP_STORED):
    arrays, index = moment_files(latents, spread)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in arrays.items():
            with archive.open(name, "w") as file:
                np.save(file, array)
        archive.writestr("dataset.json", json.dumps(index))


def write_shards(path, latents, dtype=torch.float32, mirrored=True):
    """LightningDiT: two shards of unequal length, and the statistics it would compute."""
    path.mkdir(exist_ok=True)
    values = torch.from_numpy(latents)
    for number, rows in enumerate((slice(0, 5), slice(5, COUNT))):
        tensors = {"latents": values[rows].to(dtype), "labels": torch.from_numpy(LABELS[rows])}
        if mirrored:
            tensors["latents_flip"] = tensors["latents"] + 100
        save_file(tensors, path / f"latents_rank00_shard{number:03d}.safetensors")
    statistics = {"mean": values.mean((0, 2, 3), keepdim=True), "std": values.std((0, 2, 3), keepdim=True)}
    torch.save(statistics, path / "latents_stats.pt")
    return statistics


def write_arrays(path, latents):
    path.mkdir()
    np.save(path / "latents.npy", latents)
    np.save(path / "labels.npy", LABELS)


FILE_FORMATS = {
    "pairs": write_pairs,
    "moments": write_moments,
    "repa": lambda path, latents: write_moments(path / "vae-sd", latents),
    "zip": lambda path, latents: write_zip(path, latents),
    "shards": write_shards,
    "arrays": write_arrays,
    "npz": lambda path, latents: np.savez(path, latents=latents, labels=LABELS),
}


@pytest.fixture(params=FILE_FORMATS)
def stored(request, tmp_path, latents):
    path = tmp_path / {"zip": "vae-sd.zip", "npz": "a.npz"}.get(request.param, request.param)
    FILE_FORMATS[request.param](path, latents)
    return path


def everything(data):
    """What an epoch shows, by stored item."""
    return {data.split.item(n): data[n] for n in range(len(data.split))}


# --- every file format --------------------------------------------------------------------------------------------


def test_every_latent_comes_as_stored_with_its_label(stored, latents):
    data = LatentDataset(stored, held_out=0, flip=False, scale=1.0)
    assert data.shape == SHAPE and data.class_names == ("0", "1", "2")
    shown = everything(data)
    assert len(shown) == COUNT
    for item, (x, label) in shown.items():
        assert x.dtype == torch.float32 and isinstance(label, int) and label == LABELS[item]
        assert np.array_equal(x.numpy(), latents[item])


def test_samples_repeat_in_other_processes_and_splits_are_disjoint(stored):
    section = DataSection(kind="latents", path=str(stored), held_out=0.25)
    data = create_dataset(section, seed=5)
    # Read here first, so that a loading process that went on with the parent's open files would show.
    expected = [data[n] for n in range(8, 16)]
    copy = pickle.loads(pickle.dumps(data))
    for loaded in (batches(data, 2, 4, 4, workers=2), batches(copy, 2, 4, 4)):
        x, y = (torch.cat(parts) for parts in zip(*loaded, strict=True))
        assert torch.equal(x, torch.stack([a for a, _ in expected])) and y.tolist() == [b for _, b in expected]
    held_out = create_dataset(section, "held_out", seed=5)
    assert len(held_out.split) == 3
    assert set(everything(held_out)) | set(everything(data)) == set(range(COUNT))


def test_trains_on_it(stored, tmp_path):
    tiny = {"in_channels": 4, "grid": [8, 8], "hidden_size": 128, "depth": 1, "num_heads": 2}
    config = override(
        {
            "model": {"name": "DC-DiT-S", "num_classes": 3, "overrides": tiny},
            "data": {"kind": "latents", "path": str(stored), "held_out": 0.25},
            "optim": {"steps": 2, "batch_size": 4, "device": "cpu"},
            "router": {"group_size": None},
            "run": {"out": str(tmp_path / "run"), "log_every": 1, "eval_every": 2, "eval_images": 3},
        },
        [],
    )
    records = []
    assert train(config, callbacks=[records.append]).step == 2
    assert [np.isfinite(r["loss"]) for r in records if "loss" in r] == [True, True]
    assert np.isfinite(records[-1]["val_loss"])


# --- what a model sees --------------------------------------------------------------------------------------------


def test_pairs_are_scaled_already(tmp_path, latents):
    write_pairs(tmp_path, latents)
    shown = everything(LatentDataset(tmp_path, held_out=0))
    assert all(np.array_equal(x.numpy(), latents[item]) for item, (x, _) in shown.items())


@pytest.mark.parametrize("write", [write_moments, write_zip])
@pytest.mark.parametrize("spread", [0.5, 2 * np.log(0.5)], ids=["std", "logvar"])
def test_moments_are_drawn_anew_for_every_sample(tmp_path, latents, write, spread):
    path = tmp_path / "m.zip"
    write(path, latents, spread)
    data = LatentDataset(path, held_out=0)
    noise = {}
    for n in range(4 * COUNT):
        item = data.split.item(n)
        noise.setdefault(item, []).append((data[n][0].double().numpy() / 0.18215 - latents[item]) / 0.5)
    drawn = np.stack(list(noise.values()))  # [image, epoch, C, h, w]
    assert abs(drawn.mean()) < 0.05 and abs(drawn.std() - 1) < 0.05
    assert np.abs(np.corrcoef(drawn.swapaxes(0, 1).reshape(4, -1)) - np.eye(4)).max() < 0.1
    assert torch.equal(LatentDataset(path, held_out=0)[7][0], data[7][0])
    assert not torch.equal(LatentDataset(path, held_out=0, seed=1)[7][0], data[7][0])
    one, two = (LatentDataset(path, "held_out", seed=seed) for seed in (0, 1))
    assert torch.equal(one[0][0], two[0][0])


def test_statistics_are_divided_out_as_lightningdit_does(tmp_path, latents):
    statistics = write_shards(tmp_path, latents)
    for item, (x, _) in everything(LatentDataset(tmp_path, held_out=0, flip=False)).items():
        expected = (torch.from_numpy(latents[item : item + 1]) - statistics["mean"]) / statistics["std"]
        torch.testing.assert_close(x[None], expected)


def test_stored_mirror_images_are_shown_half_of_the_time(tmp_path, latents):
    write_shards(tmp_path, latents, torch.bfloat16)
    data = LatentDataset(tmp_path, held_out=0.25, scale=1.0)
    mirrored = [bool(data[n][0].mean() > 50) for n in range(200)]
    assert 60 < sum(mirrored) < 140
    held_out = LatentDataset(tmp_path, "held_out", held_out=0.25, scale=1.0)
    assert all(held_out[n][0].mean() < 50 for n in range(20))
    write_shards(tmp_path, latents, mirrored=False)
    assert all(LatentDataset(tmp_path, scale=1.0)[n][0].mean() < 50 for n in range(20))


def test_moments_without_labels_are_of_one_class(tmp_path, latents):
    write_moments(tmp_path, latents)
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    data = LatentDataset(tmp_path, held_out=0, scale=1.0)
    shown = everything(data)
    assert data.class_names == ("0",) and len(shown) == COUNT
    assert all(label == 0 and np.array_equal(x.numpy(), latents[item]) for item, (x, label) in shown.items())


# --- damage -------------------------------------------------------------------------------------------------------


def read_all(path):
    return everything(LatentDataset(path, held_out=0, scale=1.0))


def read_without(path, latents, missing, match):
    """With skip_damaged, an epoch shows all but the damaged, and one warning names the file and the count."""
    with pytest.warns(UserWarning, match=match) as warned:
        data = LatentDataset(path, held_out=0, flip=False, scale=1.0, skip_damaged=True)
        shown = [data[n] for n in range(COUNT)]
        again = [data[n] for n in range(COUNT)]
    assert len(warned) == 1
    kept = {latents[item].tobytes() for item in range(COUNT) if item not in missing}
    assert {x.numpy().tobytes() for x, _ in shown} == kept
    assert all(torch.equal(a, b) and m == n for (a, m), (b, n) in zip(shown, again, strict=True))


SPOILED = {
    "missing": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-4]),
    "empty": lambda file: file.write_bytes(b""),
    "shape": lambda file: np.save(file, np.zeros((1, 8, 8, 4), np.float32)),
    "dtype": lambda file: np.save(file, np.zeros((4, 8, 8), int)),
    "nan": lambda file: np.save(file, np.full((4, 8, 8), np.nan, np.float32)),
    "pickled": lambda file: np.save(file, np.array([{}]), allow_pickle=True),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_damaged_feature_is_named_and_skipped_if_asked(tmp_path, latents, spoil):
    write_pairs(tmp_path, latents)
    spoil(tmp_path / "imagenet256_features" / "10.npy")
    with pytest.raises(ValueError, match=r"imagenet256_features/10\.npy"):
        read_all(tmp_path)
    read_without(tmp_path, latents, {10}, r"skipped: .*features/10\.npy.*(1 so far|one of 1)")


@pytest.mark.parametrize("label", [None, -1, 1.5])
def test_damaged_label_is_named_and_skipped_if_asked(tmp_path, latents, label):
    write_pairs(tmp_path, latents)
    file = tmp_path / "imagenet256_labels" / "3.npy"
    file.unlink() if label is None else np.save(file, np.array([label]))
    with pytest.raises(ValueError, match=r"imagenet256_labels/3\.npy"):
        read_all(tmp_path)
    read_without(tmp_path, latents, {3}, r"skipped: .*labels/3\.npy")


@pytest.mark.parametrize("spoil", list(SPOILED.values())[:3], ids=list(SPOILED)[:3])
def test_damaged_moments_are_named_and_skipped_if_asked(tmp_path, latents, spoil):
    write_moments(tmp_path, latents)
    spoil(tmp_path / "00000" / "img-mean-std-00000000.npy")
    with pytest.raises(ValueError, match=r"00000/img-mean-std-00000000\.npy"):
        read_all(tmp_path)
    read_without(tmp_path, latents, {0}, r"img-mean-std-00000000\.npy: .*1 so far")


def test_flipped_bit_in_a_zip_is_found(tmp_path, latents):
    path = tmp_path / "a.zip"
    write_zip(path, latents)
    data = bytearray(path.read_bytes())
    at = data.index(latents[7].tobytes()) + 100
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.zip/00000/img-mean-std-00000007\.npy: it differs from the zip's own"):
        read_all(path)
    read_without(path, latents, {7}, r"img-mean-std-00000007\.npy: .*1 so far")


def test_name_that_the_zip_lacks(tmp_path, latents):
    path = tmp_path / "a.zip"
    write_zip(path, latents)
    with zipfile.ZipFile(path, "a") as archive:
        index = json.loads(archive.read("dataset.json"))
        index["labels"].append(["99999/more.npy", 0])
        archive.writestr("dataset.json", json.dumps(index))
    with pytest.raises(ValueError, match=r"99999/more\.npy: no such file in the zip"):
        read_all(path)


def test_compressed_zip_is_refused(tmp_path, latents):
    write_zip(tmp_path / "a.zip", latents, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"a\.zip compresses '.*\.npy'; accepted: a zip without compression"):
        LatentDataset(tmp_path / "a.zip")


@pytest.mark.parametrize("spoil", ["cut", "empty", "tensors", "shape", "labels"])
def test_damaged_shard_is_named_and_skipped_if_asked(tmp_path, latents, spoil):
    write_shards(tmp_path, latents)
    file = tmp_path / "latents_rank00_shard000.safetensors"
    good = {"latents": torch.zeros(5, 4, 8, 8), "latents_flip": torch.zeros(5, 4, 8, 8), "labels": torch.arange(5)}
    wrong = {
        "tensors": {"latents": good["latents"]},
        "shape": good | {"latents_flip": torch.zeros(4, 4, 8, 8)},
        "labels": good | {"labels": torch.arange(5) - 1},
    }
    save_file(wrong[spoil], file) if spoil in wrong else SPOILED[spoil](file)
    with pytest.raises(ValueError, match=r"latents_rank00_shard000\.safetensors"):
        LatentDataset(tmp_path)
    read_without(tmp_path, latents, set(range(5)), r"skipped: .*latents_rank00_shard000\.safetensors")


def test_shard_unlike_the_first_is_named(tmp_path, latents):
    write_shards(tmp_path, latents)
    other = torch.zeros(2, 8, 4, 4)
    tensors = {"latents": other, "latents_flip": other.clone(), "labels": torch.arange(2)}
    save_file(tensors, tmp_path / "more.safetensors")
    with pytest.raises(
        ValueError, match=r"more\.safetensors: latents has the shape \[2, 8, .*; accepted: \[2, 4, 8, 8\]"
    ):
        LatentDataset(tmp_path)


def test_nothing_left(tmp_path, latents):
    write_pairs(tmp_path, latents)
    data = LatentDataset(tmp_path, held_out=0, skip_damaged=True)
    for file in (tmp_path / "imagenet256_features").iterdir():
        file.unlink()
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="none of the 12 items from sample 3 on"),
    ):
        data[3]


# --- what is refused ------------------------------------------------------------------------------------------------


def test_unknown_file_formats(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no latents at .*nowhere"):
        LatentDataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no latents in a known file format; accepted: \*\.safetensors"):
        LatentDataset(tmp_path)
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "1.PNG").touch()
    with pytest.raises(ValueError, match=r"an \.npz of both; it holds images: dcdit extract makes latents of them"):
        LatentDataset(tmp_path)
    shutil.rmtree(tmp_path / "cats")
    (tmp_path / "imagenet256_features").mkdir()
    (tmp_path / "imagenet256_labels").mkdir()
    with pytest.raises(ValueError, match="hold no pairs"):
        LatentDataset(tmp_path)
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.zeros(2, int))
    with pytest.raises(ValueError, match=r"a\.npz holds images; accepted: latents and labels"):
        LatentDataset(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "index", ["", "[]", '{"names": []}', '{"labels": [["a.npy", -1]]}', '{"labels": [["a.png", 1]]}', '{"labels": []}']
)
def test_bad_index(tmp_path, index):
    (tmp_path / "dataset.json").write_text(index)
    with pytest.raises(ValueError, match=str(tmp_path.name)) as error:
        LatentDataset(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../outside.npy", "a/../../outside.npy", "{tmp}/outside.npy"])
def test_an_index_names_no_file_outside_of_its_folder(tmp_path, name):
    folder = tmp_path / "latents"
    folder.mkdir()
    np.save(tmp_path / "outside.npy", np.ones((8, 4, 4), np.float32))
    (folder / "dataset.json").write_text(json.dumps({"labels": [[name.format(tmp=tmp_path), 0]]}))
    with pytest.raises(ValueError, match=r"dataset\.json lists '\S+outside\.npy'; accepted: files inside the folder$"):
        LatentDataset(folder, held_out=0)


def test_bad_zip(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 but then not")
    with pytest.raises(ValueError, match=r"a\.zip is damaged or no zip"):
        LatentDataset(tmp_path / "a.zip")


def test_statistics_are_required_and_never_unpickled(tmp_path, latents):
    write_shards(tmp_path, latents)
    (tmp_path / "latents_stats.pt").write_bytes(pickle.dumps({"mean": np.zeros(4), "std": np.ones(4)}))
    with pytest.raises(ValueError, match=r"latents_stats\.pt cannot be read as a file of torch\.save"):
        LatentDataset(tmp_path)
    torch.save({"mean": torch.zeros(4), "std": torch.zeros(4)}, tmp_path / "latents_stats.pt")
    with pytest.raises(
        ValueError, match=r"latents_stats\.pt holds the mean .* and the std .*; accepted: finite numbers, a std above 0"
    ):
        LatentDataset(tmp_path)
    (tmp_path / "latents_stats.pt").unlink()
    with pytest.raises(ValueError, match=r"neither manifest\.json nor latents_stats\.pt; accepted: .*data\.scale"):
        LatentDataset(tmp_path)
