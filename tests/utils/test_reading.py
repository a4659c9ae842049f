"""Files of strangers: what is opened is what was looked at, and no more is read than is there."""

import os
import threading

import pytest
import torch
from safetensors.torch import save_file

from dcdit.utils.pickles import load_pickled
from dcdit.utils.reading import open_regular, read_bytes, read_json
from dcdit.utils.tensors import open_tensors


def test_no_pipe_takes_the_place_of_a_file_between_the_look_and_the_opening(tmp_path):
    """The path is swapped all the time: each reader gets the file or refuses the pipe, and never waits."""
    file, pipe, path = tmp_path / "file", tmp_path / "pipe", tmp_path / "path"
    save_file({"a": torch.arange(4)}, file)
    os.mkfifo(pipe)
    os.link(file, path)
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            for other in (pipe, file):
                os.link(other, tmp_path / "next")
                os.replace(tmp_path / "next", path)

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        seen = set()
        for _ in range(500):
            try:
                with open_tensors(path) as tensors:
                    seen.add(tuple(tensors.get_tensor("a").tolist()))
            except ValueError as error:
                assert "no regular file but a named pipe" in str(error)
                seen.add("refused")
    finally:
        stop.set()
        swapper.join()
    assert seen <= {(0, 1, 2, 3), "refused"} and seen


def test_tensors_outlive_the_block(tmp_path):
    save_file({"a": torch.arange(4.0)}, tmp_path / "a")
    with open_tensors(tmp_path / "a") as opened:
        part = opened.get_slice("a")
    (tmp_path / "a").unlink()
    assert part[1:3].tolist() == [1, 2]


def test_kinds_of_files_that_are_not_opened(tmp_path):
    for path, kind in ((tmp_path, "a folder"), ("/dev/zero", "a device")):
        with pytest.raises(OSError, match=f"no regular file but {kind}"), open_regular(path):
            pass
    with pytest.raises(FileNotFoundError), open_regular(tmp_path / "gone"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"1")
    assert read_bytes(tmp_path / "link", 1) == b"1"


def test_sizes_are_compared_before_anything_is_read(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)  # a file of holes
    with pytest.raises(ValueError, match=r"large is too large.*; accepted: at most 67108864 bytes"):
        read_json(tmp_path / "large")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        ("[" * 10**5, "nested too deep"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("{", "Expecting"),
    ],
)
def test_what_is_no_json(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json is damaged or no JSON: .*{reason}"):
        read_json(tmp_path / "a.json")


def test_tensors_and_plain_values_are_unpickled(tmp_path):
    content = {"epoch": 3, "ema": {"w": torch.arange(3)}}
    for new in (True, False):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        loaded = load_pickled(tmp_path / "a.pt")
        assert loaded["epoch"] == 3 and torch.equal(loaded["ema"]["w"], torch.arange(3))
