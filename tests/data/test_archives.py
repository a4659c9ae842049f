"""Archives of arrays: sizes are compared with the file before they are believed, and damage is one line."""

import io
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from dcdit.data import NpzDataset
from dcdit.data.archives import UnreadableArchive, map_npy, open_npz
from dcdit.evaluate import Statistics
from dcdit.evaluate.images import open_images

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


def header(shape, descr="|u1"):
    """The header of an array, whatever follows."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def raw_header(text):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def read(path, name):
    with open_npz(path) as archive:
        return archive.read(name)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_arrays_come_as_they_were_written(tmp_path, compression):
    arrays = {"a": IMAGES, "b": np.asfortranarray(IMAGES[0]), "c": np.str_("text"), "d": np.zeros((0, 3))}
    path = write(tmp_path / "a.npz", compression, **{name: npy(array) for name, array in arrays.items()})
    with open_npz(path) as archive:
        assert archive.names == list(arrays) and "a" in archive and "e" not in archive
        for name, array in arrays.items():
            assert np.array_equal(archive.read(name), array) and archive.read(name).dtype == array.dtype
        with archive.stream("a") as (found, file):
            assert (found.shape, found.dtype, found.fortran) == (IMAGES.shape, np.uint8, False)
            assert file.read() == IMAGES.tobytes()


CLAIMS = {
    "far too many": header((10**9, 4, 16, 16), "<f4") + bytes(100),
    "one row too many": header((13, 8, 8, 3)) + IMAGES.tobytes(),
    "one row too few": header((11, 8, 8, 3)) + IMAGES.tobytes(),
    "negative": header((-12, -8, 8, 3)) + IMAGES.tobytes(),
    "wide numbers": header((12,), "|V1000000000") + bytes(100),
    "a wider dtype": header((12, 8, 8, 3), "<f8") + IMAGES.tobytes(),
}


@pytest.mark.parametrize("content", CLAIMS.values(), ids=CLAIMS)
def test_a_header_that_does_not_fit_the_data_takes_no_memory(tmp_path, content):
    path = write(tmp_path / "a.npz", images=content, arr_0=content, mu=content, labels=npy(np.zeros(12, int)))
    tracemalloc.start()
    with pytest.raises(
        UnreadableArchive, match=r"a\.npz is not readable as \.npz: images: it is said to be .*, and has \d+$"
    ):
        read(path, "images")
    for reader in (NpzDataset, open_images, Statistics.load):
        with pytest.raises(ValueError, match=r"a\.npz is not readable as .*: (images|arr_0|mu): it is said to be"):
            reader(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


HEADERS = {
    "empty": b"",
    "another magic": b"\x92NUMPY\x01\x00" + bytes(20),
    "another version": b"\x93NUMPY\x09\x00" + bytes(20),
    "brackets": raw_header(b"(" * 5000),
    "no dict": raw_header(b"5"),
    "names": raw_header(b"{'descr': x, 'fortran_order': False, 'shape': (1,)}"),
    "shape of text": raw_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': 'abc'}"),
    "no dtype": raw_header(b"{'descr': 'abc', 'fortran_order': False, 'shape': (1,)}"),
    "not ASCII": raw_header(b"\xff\xfe\x00" * 30),
    "too long": raw_header(b" " * 60_000),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_damaged_header_is_one_line(tmp_path, content):
    path = write(tmp_path / "a.npz", images=content, labels=npy(np.zeros(12, int)))
    for reader in (NpzDataset, open_images):
        with pytest.raises(ValueError, match=r"a\.npz is not readable as .*: images: ") as error:
            reader(path)
        assert "\n" not in str(error.value)


def test_python_objects_are_never_unpickled(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    np.savez(tmp_path / "a.npz", images=np.array([Runs()]), labels=np.zeros(1, int))
    with pytest.raises(ValueError, match="images: it holds Python objects; accepted: numbers or text"):
        NpzDataset(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


def test_an_array_that_unpacks_to_far_more_than_its_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dcdit.data.archives.FREE_BYTES", 100_000)
    path = write(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, a=npy(np.zeros(1_000_000, np.uint8)), b=npy(IMAGES))
    assert np.array_equal(read(path, "b"), IMAGES)
    with pytest.raises(UnreadableArchive, match=r"a unpacks from \d+ bytes to 1000128; accepted: 100 times"):
        read(path, "a")
    monkeypatch.setattr("dcdit.data.archives.FREE_BYTES", 2_000_000)
    assert not read(path, "a").any()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_byte_is_found(tmp_path, compression):
    path = write(tmp_path / "a.npz", compression, arr_0=npy(IMAGES), images=npy(IMAGES), labels=npy(np.zeros(12, int)))
    data = bytearray(path.read_bytes())
    data[1000] ^= 255
    data[4000] ^= 255
    path.write_bytes(data)
    for reader in (NpzDataset, lambda path: list(open_images(path).batches(5))):
        with pytest.raises(ValueError, match=r"a\.npz is not readable as ") as error:
            reader(path)
        assert "\n" not in str(error.value)


def test_damage_anywhere_is_found_or_does_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"arr_0": npy(IMAGES), "images": npy(IMAGES), "labels": npy(np.arange(12))}
    good = write(tmp_path / "a.npz", zipfile.ZIP_DEFLATED, **arrays).read_bytes()
    refused = 0
    for trial in range(300):
        data = bytearray(good[: rng.integers(len(good))] if trial % 4 == 0 else good)
        for position in rng.integers(0, max(len(data), 1), 3 if data else 0):
            data[position] = rng.integers(256)
        (tmp_path / "b.npz").write_bytes(data)
        try:
            images = np.concatenate(list(open_images(tmp_path / "b.npz").batches(5)))
            assert np.array_equal(images, IMAGES)
            assert np.array_equal(NpzDataset(tmp_path / "b.npz").values, IMAGES)
        except ValueError as error:
            refused += 1
            assert "b.npz" in str(error) and "\n" not in str(error)
    assert refused > 150


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "a.npz")
    (tmp_path / "b.npz").symlink_to("/dev/zero")
    for name in "ab":
        for reader in (NpzDataset, open_images, Statistics.load):
            with pytest.raises(ValueError, match=rf"{name}\.npz is not readable as .*no regular file"):
                reader(tmp_path / f"{name}.npz")
    (tmp_path / "arrays").mkdir()
    os.mkfifo(tmp_path / "arrays" / "images.npy")
    with pytest.raises(ValueError, match=r"arrays is not readable as NumPy arrays: .*no regular file"):
        NpzDataset(tmp_path / "arrays")
    with pytest.raises(ValueError, match=r"images\.npy is not readable as images: .*no regular file"):
        open_images(tmp_path / "arrays")


def test_mapped_arrays_are_no_larger_than_their_file(tmp_path):
    (tmp_path / "a.npy").write_bytes(header((13, 8, 8, 3)) + IMAGES.tobytes())
    with pytest.raises(ValueError):
        map_npy(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"a\.npy is not readable as images: "):
        open_images(tmp_path / "a.npy")
    np.savez(tmp_path / "b.npz", a=IMAGES)
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    with pytest.raises(ValueError, match=r"b\.npy is not readable as images: "):
        open_images(tmp_path / "b.npy")
