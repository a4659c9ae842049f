"""Which files of a folder are images of which class; what shifts labels is an error, what is left out is counted."""

import os
import re
import warnings

import numpy as np
import pytest
from PIL import Image

from dcdit.data.listing import CLUTTER, image_files

PIXELS = np.zeros((4, 4, 3), np.uint8)


def write(folder, *names):
    """An image under each name, whose pixels nobody reads, or an empty file where it has no suffix of an image."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS).save(folder / name, format="PNG")


def silently(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return image_files(path)


def warned(path):
    """What ``image_files`` returns, and the one line that it says."""
    with pytest.warns(UserWarning) as caught:
        found = image_files(path)
    (warning,) = caught
    message = str(warning.message)
    assert "\n" not in message and message.startswith(f"{path}: ")
    return found, message.removeprefix(f"{path}: ")


def test_classes_in_alphabetical_order_without_a_word(tmp_path):
    write(tmp_path, "b/1.png", "b/0.png", "a/0.png", "Z/0.png")
    files, labels, names = silently(tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in files] == ["Z/0.png", "a/0.png", "b/0.png", "b/1.png"]
    assert labels == [0, 1, 2, 2] and names == ("Z", "a", "b")


def test_a_flat_folder_is_one_class(tmp_path):
    write(tmp_path / "flat", "1.png", "0.png")
    files, labels, names = silently(tmp_path / "flat")
    assert [file.name for file in files] == ["0.png", "1.png"] and labels == [0, 0] and names == ("flat",)


SUFFIXES = ("png", "JPEG", "Jpg", "webp", "bmp", "tif", "TIFF", "gif", "ppm", "pgm", "pbm")


def test_every_suffix_is_read_in_any_case(tmp_path):
    write(tmp_path, *(f"a/{suffix}.{suffix}" for suffix in SUFFIXES), "b/0.tif")
    files, labels, names = silently(tmp_path)
    assert sorted(file.stem for file in files if file.parent.name == "a") == sorted(SUFFIXES)
    assert labels == [0] * len(SUFFIXES) + [1] and names == ("a", "b")


# --- what is never a class ------------------------------------------------------------------------------------------


FOLDERS = (".ipynb_checkpoints", ".git", ".Trash-1000", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "#recycle")


@pytest.mark.parametrize("name", [*FOLDERS, "System Volume Information", ".AppleDouble", *CLUTTER])
def test_clutter_is_never_a_class(tmp_path, name):
    write(tmp_path, "b/0.png", "c/0.png", f"{name}/0.png", f"c/{name}/0.png")
    (files, labels, names), message = warned(tmp_path)
    assert labels == [0, 1] and names == ("b", "c") and len(files) == 2
    assert message == f"left out, hidden or of the system: 2 ('{name}', 'c/{name}')"
    write(tmp_path / "flat", "0.png", f"{name}/0.png")
    (files, labels, _), _ = warned(tmp_path / "flat")
    assert len(files) == 1 and labels == [0]


def test_hidden_images_are_none(tmp_path):
    write(tmp_path, "a/0.png", "a/._0.png", "a/.1.png")
    (files, _, _), message = warned(tmp_path)
    assert [file.name for file in files] == [
        "0.png"
    ] and "hidden or of the system: 2 ('a/.1.png', 'a/._0.png')" in message


# --- what keeps its number ------------------------------------------------------------------------------------------


def test_an_empty_class_keeps_its_number(tmp_path):
    """As in a part of ImageNet: the labels are those of the whole."""
    write(tmp_path, "n01/0.png", "n03/0.png", "n05/0.png", "n04/.DS_Store")
    (tmp_path / "n02").mkdir()
    (_, labels, names), message = warned(tmp_path)
    assert labels == [0, 2, 4] and names == ("n01", "n02", "n03", "n04", "n05")
    assert message.endswith("classes without images, which keep their number: 2 ('n02', 'n04')")


# --- what is counted ------------------------------------------------------------------------------------------------


def test_everything_left_out_is_counted(tmp_path):
    write(
        tmp_path,
        "a/0.png",
        "a/1.heic",
        "a/2.heic",
        "a/3.HEIC",
        "b/0.png",
        "b/list.txt",
        "README",
        "b/x.npy",
        "b/y.avif",
    )
    write(tmp_path, "a/more/0.png", "a/more/deep/1.png", "a/more/2.txt", "b/thumbs/0.png", ".x/0.png")
    (files, labels, _), message = warned(tmp_path)
    assert len(files) == 2 and labels == [0, 1]
    assert message == (
        "left out, of other kinds: 3 '.heic', 1 without a suffix, 1 '.txt', 2 others; "
        "left out, hidden or of the system: 1 ('.x'); "
        "left out, folders in a class, with 3 images: 2 ('a/more', 'b/thumbs')"
    )


def test_names_in_the_line_are_few_and_have_no_control_characters(tmp_path):
    write(tmp_path, "a/0.png", *(f".{number}\x1b[31m\n/0.png" for number in range(5)))
    _, message = warned(tmp_path)
    assert message == (
        "left out, hidden or of the system: 5 ('.0\\x1b[31m\\n', '.1\\x1b[31m\\n', '.2\\x1b[31m\\n', ...)"
    )


def turned(path, count, of):
    for number in range(of):
        exif = Image.Exif()
        exif[0x0112] = 6 if number < count else 1
        Image.fromarray(PIXELS).save(path / f"{number}.jpg", exif=exif)


def test_images_with_an_orientation_are_counted(tmp_path, monkeypatch):
    turned(tmp_path, 3, 5)
    assert warned(tmp_path)[1] == "with an EXIF orientation, which is applied: 3 of 5 images"
    (tmp_path / "1.jpg").write_bytes(b"damaged")
    assert warned(tmp_path)[1] == "with an EXIF orientation, which is applied: 2 of 5 images"
    monkeypatch.setattr("dcdit.data.listing.LOOKED_AT", 3)  # 0, 2 and 4
    assert warned(tmp_path)[1] == "with an EXIF orientation, which is applied: 2 of 3 looked at of 5 images"


@pytest.mark.parametrize("kind", [".png", ".tif", ".webp"])
def test_orientation_is_found_in_every_format(tmp_path, kind):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(PIXELS).save(tmp_path / f"a{kind}", exif=exif)
    assert warned(tmp_path)[1].endswith("1 of 1 images")


def test_of_several_processes_the_first_one_warns(tmp_path, monkeypatch):
    write(tmp_path, "a/0.png", ".x/0.png")
    monkeypatch.setenv("RANK", "1")
    assert len(silently(tmp_path)[0]) == 1
    monkeypatch.setenv("RANK", "0")
    warned(tmp_path)


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(path, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message) as error:
            image_files(path)
    assert "\n" not in str(error.value)


def test_a_class_with_images_only_in_folders_of_its_own(tmp_path):
    write(tmp_path, "a/0.png", "b/train/0.png", "b/train/1.png", "c/0.png")
    b = re.escape(str(tmp_path / "b"))
    refused(
        tmp_path, f"^'{b}' holds no image itself, but 2 in folders such as '{b}/train'; accepted: images directly in"
    )


def test_a_folder_of_splits(tmp_path):
    """Otherwise "train" and "val" would be the classes."""
    write(tmp_path, "train/cat/0.png", "train/dog/0.png", "val/cat/0.png")
    refused(
        tmp_path,
        "train' holds no image itself, but 2 in folders such as .*; accepted: images directly in class folders",
    )


@pytest.mark.parametrize("inside", ["0.heic", "labels.xml", "0"])
def test_a_folder_of_other_files_may_be_no_class(tmp_path, inside):
    write(tmp_path, "a/0.png", f"b/{inside}", "c/0.png")
    refused(tmp_path, r"/b' holds no image \(1 .*\), so it may be no class; accepted: .* or an empty one, which keeps")


def test_images_beside_class_folders(tmp_path):
    write(tmp_path, "0.png", "a/b/c/0.png")
    refused(tmp_path, r"holds images beside class folders \('a'\); only one of the two")


def test_a_flat_folder_with_a_folder_that_holds_none(tmp_path):
    write(tmp_path, "0.png", "notes/list.txt")
    assert warned(tmp_path)[1] == "left out, folders in a class, with 0 images: 1 ('notes')"


def test_no_images_at_all(tmp_path):
    refused(tmp_path, r"^no images in '.*' \(no files\); accepted: \.png, ")
    (tmp_path / "empty").mkdir()
    write(tmp_path, "0.heic", "a/1.heic")
    refused(tmp_path, r"^no images in '.*' \(2 '\.heic'\); accepted: \.png, ")


# --- links ----------------------------------------------------------------------------------------------------------


def test_links_to_classes_and_images_are_followed_and_circles_are_not(tmp_path):
    write(tmp_path / "store", "cats/0.png", "dog.png")
    data = tmp_path / "data"
    write(data, "a/0.png")
    (data / "cats").symlink_to(tmp_path / "store" / "cats")
    (data / "a" / "dog.png").symlink_to(tmp_path / "store" / "dog.png")
    assert silently(data)[1:] == ([0, 0, 1], ("a", "cats"))
    (data / "a" / "inside").mkdir()
    os.symlink(data / "a", data / "a" / "inside" / "circle")
    assert warned(data)[1] == "left out, folders in a class, with 0 images: 1 ('a/inside')"
