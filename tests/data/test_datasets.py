"""Datasets: what a sample is, that it repeats, that held-out pixels stay out, and that bad data is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from dcdit.config import DataSection
from dcdit.data import Digits, ImageFolder, NpzDataset, Photographs, batches, create_dataset
from dcdit.data.folder import read_centre
from dcdit.data.photographs import FILES, split_box


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("birds", "cats"):
        (tmp_path / name).mkdir()
        for i in range(5):
            pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path


def check_sample(x, label, shape, classes):
    assert x.shape == shape and x.dtype == torch.float32
    assert x.is_contiguous() and -1 <= x.min() < x.max() <= 1 and x.min() < 0
    assert isinstance(label, int) and 0 <= label < classes


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1] == b[1]


# --- folders ------------------------------------------------------------------------------------------------------


def test_folder_samples(folder):
    data = ImageFolder(folder, size=16)
    assert data.class_names == ("birds", "cats")
    check_sample(*data[3], (3, 16, 16), 2)
    assert same(ImageFolder(folder, size=16)[123], data[123])
    assert not same(ImageFolder(folder, size=16, seed=1)[123], data[123])


def test_folder_epoch_shows_every_training_image_once(folder):
    train, held = (ImageFolder(folder, size=8, split=split, held_out=0.2) for split in ("train", "held_out"))
    first, second = ([train.split.item(n) for n in range(e * 8, e * 8 + 8)] for e in (0, 1))
    assert sorted(first) == sorted(second) and len(set(first)) == 8 and first != second
    assert set(first) | {held.split.item(n) for n in range(2)} == set(range(10))


def test_folder_crop_keeps_pixels(tmp_path):
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    x, label = ImageFolder(tmp_path, size=8, held_out=0, flip=False)[0]
    assert label == 0
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(pixels))


def test_folder_mirrors_some_images(tmp_path):
    Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)).save(tmp_path / "a.png")
    data = ImageFolder(tmp_path, size=8, held_out=0)
    seen = [data[n][0] for n in range(20)]
    plain = ImageFolder(tmp_path, size=8, held_out=0, flip=False)[0][0]
    mirrored = [torch.equal(x, plain.flip(-1)) for x in seen]
    assert any(mirrored) and not all(mirrored)
    assert all(torch.equal(x, plain) for x, flip in zip(seen, mirrored, strict=True) if not flip)


def test_centre_crop_of_dit(tmp_path):
    """Averaged over 2x2 pixels while twice the size or more, and cut from the middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    averages = pixels.reshape(16, 2, 24, 2, 3).mean((1, 3))[:, 4:20]
    # Pillow rounds twice, once per direction.
    assert np.abs(read_centre(tmp_path / "a.png", 16) - averages).max() <= 1
    assert np.array_equal(read_centre(tmp_path / "a.png", 32), pixels[:, 8:40])


def test_folder_skips_damaged_images_if_asked(folder):
    (folder / "birds" / "2.png").write_bytes(b"not an image")
    data = ImageFolder(folder, size=8, held_out=0, skip_damaged=True)
    with pytest.warns(UserWarning, match=r"skipped: cannot read image '.*birds/2\.png'.* \(1 so far\)") as warned:
        labels = [data[n][1] for n in range(20)]
    assert len(warned) == 1
    positions = {data.split.item(n): n for n in range(10)}
    # Its place goes to the next image, whatever class that is.
    assert labels[positions[2]] == data[positions[2] + 1][1]


def test_folder_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image folder .*nowhere"):
        ImageFolder(tmp_path / "nowhere")


def test_folder_empty(tmp_path):
    with pytest.raises(ValueError, match=r"no images in .*accepted: \.png"):
        ImageFolder(tmp_path)


def test_folder_mixed(folder):
    Image.new("RGB", (8, 8)).save(folder / "stray.png")
    with pytest.raises(ValueError, match="beside class folders"):
        ImageFolder(folder)


@pytest.mark.parametrize("content", [b"not an image", b"", b"\x89PNG\r\n\x1a\nbroken"])
def test_folder_unreadable_image_is_named(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"^cannot read image '.*bad\.png'") as error:
        ImageFolder(tmp_path, size=8, held_out=0)[0]
    assert "\n" not in str(error.value)


def test_folder_truncated_image_is_named(folder):
    file = folder / "cats" / "0.png"
    file.write_bytes(file.read_bytes()[:500])
    data = ImageFolder(folder, size=8, held_out=0)
    with pytest.raises(ValueError, match=r"cannot read image '.*cats/0\.png'"):
        for n in range(10):
            data[n]


def test_unknown_split(folder):
    with pytest.raises(ValueError, match="split is 'test'; accepted: train, held_out"):
        ImageFolder(folder, split="test")


# --- digits ---------------------------------------------------------------------------------------------------------


def test_digits_are_grey_scans_with_a_dark_margin():
    data = Digits(size=20)
    for n in range(20):
        x, label = data[n]
        check_sample(x, label, (3, 20, 20), 10)
        assert torch.equal(x[0], x[1]) and torch.equal(x[0], x[2])
        assert x.max() > 0.5 and x[:, [0, -1]].max() == x[..., [0, -1]].max() == -1
    assert data.class_names == tuple("0123456789")
    assert same(Digits(size=20)[17], data[17]) and not same(Digits(size=20, seed=5)[17], data[17])


def test_a_scan_is_in_one_split_of_the_digits():
    splits = {split: Digits(size=10, split=split, held_out=0.1) for split in ("train", "held_out")}
    scans = {split: [data[n][0] for n in range(len(data.split))] for split, data in splits.items()}
    assert (len(scans["train"]), len(scans["held_out"])) == (1617, 180)
    known = {x.numpy().tobytes() for x in scans["train"]}
    assert not known & {x.numpy().tobytes() for x in scans["held_out"]}
    other = Digits(size=10, split="held_out", held_out=0.1, seed=7)
    assert all(same(other[n], splits["held_out"][n]) for n in range(20))


def test_digits_have_a_size():
    with pytest.raises(ValueError, match="size is 0; accepted: a whole number of at least 1"):
        Digits(size=0)


# --- photographs --------------------------------------------------------------------------------------------------


def test_photographs_samples():
    data = Photographs(size=32, downscale=4)
    labels = set()
    for n in range(60):
        x, label = data[n]
        check_sample(x, label, (3, 32, 32), 6)
        labels.add(label)
    assert labels == set(range(6))
    assert same(Photographs(size=32, downscale=4)[17], data[17])
    assert not same(Photographs(size=32, downscale=4, seed=5)[17], data[17])


def test_held_out_samples_do_not_depend_on_the_seed():
    one, two = (Photographs(size=32, downscale=4, split="held_out", seed=seed) for seed in (0, 1))
    assert all(same(one[n], two[n]) for n in range(5))


@pytest.mark.parametrize("size", [(512, 512), (451, 300), (427, 640)])
@pytest.mark.parametrize("held_out", [0.05, 0.2, 0.5])
def test_split_boxes_are_disjoint_and_cover(size, held_out):
    crop = 128
    (l0, t0, r0, b0), (l1, t1, r1, b1) = (split_box(*size, crop, split, held_out) for split in ("train", "held_out"))
    assert r0 <= l1 or b0 <= t1
    assert (r0 - l0) * (b0 - t0) + (r1 - l1) * (b1 - t1) == size[0] * size[1]
    assert min(r0 - l0, b0 - t0, r1 - l1, b1 - t1) >= crop


def test_training_crops_never_show_a_held_out_pixel(monkeypatch, tmp_path):
    # Photographs whose held-out part is white and whose training part is black: one white pixel in a crop would show.
    for file in FILES.values():
        pixels = np.zeros((100, 200, 3), dtype=np.uint8)
        pixels[:, 150:] = 255
        Image.fromarray(pixels).save(tmp_path / file, format="PNG")
    monkeypatch.setattr("dcdit.data.photographs._folder", lambda: tmp_path)
    train, held = (Photographs(16, 3, split=split, held_out=0.25) for split in ("train", "held_out"))
    assert all((train[n][0] == -1).all() for n in range(200))
    assert all((held[n][0] == 1).all() for n in range(200))


def test_photograph_too_small():
    with pytest.raises(ValueError, match=r"photograph 'cat': 451x300 pixels are too few .*size 64, downscale 4"):
        Photographs(size=64, downscale=4)


def test_photograph_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("dcdit.data.photographs._folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"astronaut\.png; photographs are never downloaded"):
        Photographs()


def test_no_held_out_part():
    Photographs(held_out=0)
    with pytest.raises(ValueError, match="held_out is 0 for split 'held_out'"):
        Photographs(held_out=0, split="held_out")


# --- archives -----------------------------------------------------------------------------------------------------


def test_npz_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.array([0, 2, 1, 2]))
    data = NpzDataset(tmp_path / "a.npz", held_out=0, flip=False)
    assert data.shape == (3, 8, 8) and data.class_names == ("0", "1", "2")
    item = data.split.item(1)
    x, label = data[1]
    assert label == [0, 2, 1, 2][item]
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(pixels[item]))


def test_npz_latents_come_as_stored(tmp_path):
    latents = np.random.default_rng(0).normal(size=(4, 4, 6, 6)).astype(np.float16)
    np.savez(tmp_path / "a.npz", latents=latents, labels=np.zeros(4, dtype=np.int64))
    data = NpzDataset(tmp_path / "a.npz", held_out=0)
    x, _ = data[2]
    assert x.dtype == torch.float32
    assert torch.equal(x, torch.from_numpy(latents[data.split.item(2)]).float())


def test_npy_folder_is_the_same_but_mapped(tmp_path):
    arrays = {"latents": np.random.default_rng(0).normal(size=(6, 4, 6, 6)).astype(np.float16), "labels": np.arange(6)}
    np.savez(tmp_path / "a.npz", **arrays)
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    archive, folder = NpzDataset(tmp_path / "a.npz"), NpzDataset(tmp_path)
    assert isinstance(folder.values, np.memmap)
    assert all(same(archive[n], folder[n]) for n in range(6))
    (tmp_path / "labels.npy").unlink()
    with pytest.raises(ValueError, match=r"holds \['latents'\]; accepted: labels .all 0 for one class., and"):
        NpzDataset(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "accepted: labels .all 0 for one class., and either images"),
        ({"images": np.zeros((2, 8, 8, 3)), "labels": np.zeros(2, int)}, "accepted: uint8"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8), "labels": np.zeros(2, int)}, r"\(N, H, W, 3\)"),
        ({"latents": np.zeros((2, 4, 8, 8), int), "labels": np.zeros(2, int)}, "accepted: float"),
        ({"latents": np.zeros((2, 4, 8, 8)), "labels": np.zeros(3, int)}, "accepted: 2 integers"),
        ({"latents": np.zeros((2, 4, 8, 8)), "labels": -np.ones(2, int)}, "of at least 0"),
        ({"latents": np.zeros((0, 4, 8, 8)), "labels": np.zeros(0, int)}, "holds no images"),
        ({"images": np.array([{}]), "labels": np.zeros(1, int)}, "not readable as NumPy arrays"),
    ],
)
def test_npz_bad_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        NpzDataset(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 but then not"])
def test_npz_unreadable(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz is not readable as NumPy arrays"):
        NpzDataset(tmp_path / "a.npz")


def test_npz_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no dataset"):
        NpzDataset(tmp_path / "a.npz")


# --- from a configuration, in batches -------------------------------------------------------------------------------


def test_create_dataset(folder):
    section = DataSection(path=str(folder), size=8)
    assert isinstance(create_dataset(section), ImageFolder)
    assert isinstance(create_dataset(DataSection(kind="digits", size=20)), Digits)
    assert isinstance(create_dataset(DataSection(kind="photographs", size=32)), Photographs)
    with pytest.raises(ValueError, match=r"data\.path is null"):
        create_dataset(DataSection())


def test_batches_resume_where_they_stopped(folder):
    data = ImageFolder(folder, size=8)
    whole = list(batches(data, 0, 5, 4))
    later = list(batches(ImageFolder(folder, size=8), 3, 5, 4))
    assert len(whole) == 5 and whole[0][0].shape == (4, 3, 8, 8) and whole[0][1].dtype == torch.int64
    for (x, y), (x2, y2) in zip(whole[3:], later, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_ranks_share_a_batch(folder):
    data = ImageFolder(folder, size=8)
    (whole, _), *_ = batches(data, 2, 3, 4)
    shares = [next(iter(batches(data, 2, 3, 4, rank=rank, world=2)))[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(shares), whole)
    with pytest.raises(ValueError, match="a batch of 4 does not divide over 3 processes"):
        list(batches(data, 0, 1, 4, world=3))


def test_worker_processes_change_nothing(folder):
    plain, workers = (next(iter(batches(ImageFolder(folder, size=8), 0, 1, 4, workers=w))) for w in (0, 1))
    assert same((plain[0], 0), (workers[0], 0))
