"""Sources of images, and the ``.npz`` that is written."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import images

from dcdit.evaluate.images import open_images, write_npz


def joined(source, size=None, batch=4):
    batches = list(open_images(source, size).batches(batch))
    assert all(part.dtype == np.uint8 and len(part) == batch for part in batches[:-1])
    return np.concatenate(batches)


def folder_of(pixels, path, classes=1):
    for i, image in enumerate(pixels):
        target = path / str(i % classes) if classes > 1 else path
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target / f"{i:03d}.png")
    return path


def test_every_form_gives_the_same_images(tmp_path):
    x = images(10)
    np.savez(tmp_path / "adm.npz", arr_0=x, arr_1=np.arange(10))
    np.savez_compressed(tmp_path / "ours.npz", images=x, labels=np.arange(10))
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "array").mkdir()
    np.save(tmp_path / "array" / "images.npy", x)
    paths = [tmp_path / name for name in ("adm.npz", "ours.npz", "x.npy", "array")]
    for source in (x, torch.tensor(x), *paths, str(paths[0]), folder_of(x, tmp_path / "flat")):
        assert np.array_equal(joined(source), x), source
        assert open_images(source).count == 10
    by_class = folder_of(x, tmp_path / "classes", classes=2)
    assert np.array_equal(joined(by_class), x[[*range(0, 10, 2), *range(1, 10, 2)]])


def test_write_npz_is_what_numpy_reads(tmp_path):
    x = images(10)
    write_npz(tmp_path / "a.npz", 10, iter([x[:4], x[4:8], x[8:]]), [np.arange(4), np.arange(4, 10)])
    with np.load(tmp_path / "a.npz") as archive:
        assert sorted(archive) == ["arr_0", "arr_1"]
        assert np.array_equal(archive["arr_0"], x) and archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_1"], np.arange(10))
    assert np.array_equal(joined(tmp_path / "a.npz"), x)


def test_write_npz_appears_whole_or_not_at_all(tmp_path):
    def broken():
        yield images(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_npz(tmp_path / "a.npz", 8, broken())
    assert list(tmp_path.iterdir()) == []


def test_folders_can_be_cropped(tmp_path):
    for i, size in enumerate([(16, 16), (20, 16), (16, 40)]):
        Image.fromarray(np.full((*size, 3), 40 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    with pytest.raises(
        ValueError, match=r"1\.png is 16x20 pixels, 0\.png 16x16; accepted: images of one size, or --size"
    ):
        joined(tmp_path)
    x = joined(tmp_path, size=8)
    assert x.shape == (3, 8, 8, 3) and [set(image.flat) for image in x] == [{0}, {40}, {80}]


def test_batches_of_large_images_are_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr("dcdit.evaluate.images.BATCH_BYTES", 3 * 8 * 8 * 3 + 100)
    x = images(10)
    np.savez(tmp_path / "a.npz", arr_0=x)
    for source in (x, tmp_path / "a.npz", folder_of(x, tmp_path / "folder")):
        batches = list(open_images(source).batches(50))
        assert [len(batch) for batch in batches] == [3, 3, 3, 1] and np.array_equal(np.concatenate(batches), x)
        assert [len(batch) for batch in open_images(source).batches(2)] == [2] * 5
    monkeypatch.setattr("dcdit.evaluate.images.BATCH_BYTES", 10)
    assert [len(batch) for batch in open_images(x).batches(50)] == [1] * 10


def test_an_archive_that_is_replaced_while_it_is_read(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=images(10))
    opened = open_images(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", arr_0=images(9))
    with pytest.raises(ValueError, match=r"a\.npz has changed while it was read"):
        next(opened.batches(4))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8, 3)), "images are float64"),
        (np.zeros((3, 3, 8, 8), np.uint8), "accepted: uint8 \\(N, H, W, 3\\)"),
        (np.zeros((8, 8, 3), np.uint8), "accepted: uint8 \\(N, H, W, 3\\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), "holds no images"),
        (np.zeros((20, 0, 0, 3), np.uint8), r"holds no images: they are \(20, 0, 0, 3\)"),
    ],
)
def test_arrays_that_are_no_images(array, message, tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=array)
    np.save(tmp_path / "a.npy", array)
    for source in (array, tmp_path / "a.npz", tmp_path / "a.npy"):
        with pytest.raises(ValueError, match=message):
            open_images(source)


def test_files_that_are_no_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="no images at"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no file"):
        open_images(tmp_path / "nowhere.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        open_images(tmp_path / "empty")
    np.savez(tmp_path / "latents.npz", latents=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds \['latents'\]; accepted: images as arr_0 or images"):
        open_images(tmp_path / "latents.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"not readable as \.npz"):
        open_images(tmp_path / "bad.npz")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="not readable as images"):
        open_images(tmp_path / "bad.npy")
    np.savez(tmp_path / "objects.npz", arr_0=np.array([object()]))
    with pytest.raises(ValueError, match="holds Python objects"):
        open_images(tmp_path / "objects.npz")
    np.savez(tmp_path / "fortran.npz", arr_0=np.asfortranarray(images(3)))
    with pytest.raises(ValueError, match="Fortran"):
        open_images(tmp_path / "fortran.npz")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"accepted: \.npz, \.npy, or a folder"):
        open_images(tmp_path / "bad.png")
