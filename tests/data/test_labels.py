"""Labels as files hold them: out of range is an error that names file and label, and takes no memory."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dcdit.data import LatentDataset, NpzDataset
from dcdit.data.labels import MAX_CLASSES, as_labels
from dcdit.data.samples import DamagedFile

LATENTS = np.zeros((4, 4, 8, 8), np.float32)
HUGE = [2**20, 2**32 - 1, 2**62]


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i4", "u4", "i8", "u8", ">i4"])
def test_labels_become_int64(dtype):
    found = as_labels(np.array([0, 5, 100], dtype), 3, "a")
    assert found.dtype == np.int64 and found.tolist() == [0, 5, 100]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            np.array([0, -1, -1, 1]),
            r"a: label -1 of item 1 is out of range \(2 such\); accepted: integers of at least 0 and",
        ),
        (np.array([0, 1, 7, 1]), r"a: label 7 of item 2 is out of range \(1 such\); .* below 3$"),
        (np.array([0, 1, 2]), r"a: labels are int64 \(3,\); accepted: 4 integers of at least 0"),
        (np.zeros((4, 1), int), r"accepted: 4 integers"),
        (np.zeros(4), "labels are float64"),
        (np.zeros(4, bool), "labels are bool"),
        (np.array(list("abcd")), "accepted: 4 integers"),
        (np.array([10**30] * 4), "labels are object"),
        (np.array([2**64 - 1] * 4, np.uint64), "label 18446744073709551615 of item 0"),
    ],
)
def test_what_are_no_labels(labels, message):
    with pytest.raises(DamagedFile, match=message):
        as_labels(labels, 4, "a", classes=3)


@pytest.mark.parametrize("label", HUGE)
def test_a_huge_label_is_an_error_before_it_takes_memory(tmp_path, label):
    """-1 without a sign, say. There are as many names of classes as the largest label says."""
    labels = np.array([0, 1, 2, label], np.uint64)
    np.savez(tmp_path / "images.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=labels)
    np.savez(tmp_path / "latents.npz", latents=LATENTS, labels=labels)
    message = (
        rf"label {label} of item 3 is out of range \(1 such\); accepted: integers of at least 0 and below {MAX_CLASSES}"
    )
    for reader, name in ((NpzDataset, "images.npz"), (NpzDataset, "latents.npz"), (LatentDataset, "latents.npz")):
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            reader(tmp_path / name)
    shards = tmp_path / "shards"
    shards.mkdir()
    save_file({"latents": torch.zeros(4, 4, 8, 8), "labels": torch.tensor(labels)}, shards / "a.safetensors")
    with pytest.raises(ValueError, match=rf"a\.safetensors: {message}"):
        LatentDataset(shards, scale=1.0)
    (tmp_path / "x_features").mkdir()
    (tmp_path / "x_labels").mkdir()
    for number in range(4):
        np.save(tmp_path / "x_features" / f"{number}.npy", LATENTS[:1])
        np.save(tmp_path / "x_labels" / f"{number}.npy", labels[number : number + 1].astype(np.int64))
    with pytest.raises(ValueError, match=rf"x_labels/3\.npy holds the label {label}; accepted: 0 to {MAX_CLASSES - 1}"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        [["a.npy", 10**30]],
        [["a.npy", 2**20]],
        [["a.npy", True]],
        [["a.npy", "1"]],
        [["a.npy", None]],
        [[5, 0]],
        [["a.npy", 0], ["a.npy", 1]],
    ],
)
def test_an_index_of_moments_with_other_labels(tmp_path, index):
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 8), np.float32))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": index}))
    with pytest.raises(ValueError, match=r"dataset\.json lists ") as error:
        LatentDataset(tmp_path)
    assert "\n" not in str(error.value)


def test_an_index_nested_too_deeply(tmp_path):
    (tmp_path / "dataset.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"dataset\.json is damaged or no JSON: it is nested too deep"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_labels_of_shards_in_a_floating_dtype(tmp_path, dtype):
    """They are taken as long as no other label could have been rounded to them."""
    exact = int(2 / torch.finfo(dtype).eps)
    top = min(exact, MAX_CLASSES) - 1
    labels = torch.tensor([0, 1, top - 1, top], dtype=torch.float64)
    tensors = {"latents": torch.zeros(4, 4, 8, 8), "labels": labels.to(dtype)}
    save_file(tensors, tmp_path / "a.safetensors")
    assert LatentDataset(tmp_path, scale=1.0).store.labels.tolist() == [0, 1, top - 1, top]
    for wrong in (0.5, float("nan"), float(exact), -1.0):
        save_file(tensors | {"labels": torch.tensor([0, 1, 2, wrong], dtype=dtype)}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=r"a\.safetensors: label"):
            LatentDataset(tmp_path, scale=1.0)


def test_labels_of_shards_are_names_in_their_manifest(tmp_path):
    file = tmp_path / "latents_shard00000.safetensors"
    save_file({"latents": torch.zeros(4, 4, 8, 8), "labels": torch.tensor([0, 1, 2, 3])}, file)
    shard = {
        "file": file.name,
        "images": 4,
        "bytes": file.stat().st_size,
        "sha256": "",
        "sum": [],
        "sum_of_squares": [],
    }
    manifest = {"images": 4, "shape": [4, 8, 8], "shift": 0.0, "scale": 1.0, "recipe": {}, "shards": [shard]}

    def name(count):
        names = [str(number) for number in range(count)]
        (tmp_path / "manifest.json").write_text(
            json.dumps(manifest | {"class_names": names, "format": "dcdit-latents-1"})
        )

    name(4)
    assert len(LatentDataset(tmp_path).class_names) == 4
    name(2)
    with pytest.raises(ValueError, match=r"label 2 of item 2 is out of range \(2 such\); accepted: .* and below 2$"):
        LatentDataset(tmp_path)


def test_latents_that_are_not_finite_are_named_when_they_are_read(tmp_path):
    latents = LATENTS.copy()
    latents[2, 0, 0, 0] = np.nan
    np.savez(tmp_path / "a.npz", latents=latents, labels=np.arange(4))
    data = NpzDataset(tmp_path / "a.npz", held_out=0)
    for n in range(4):
        if data.split.item(n) == 2:
            with pytest.raises(ValueError, match=r"a\.npz, latent 2 holds numbers that are not finite"):
                data[n]
        else:
            assert not data[n][0].any()
