"""Outputs that are refused: what is read, and what belongs to somebody else."""

import json

import pytest

from dcdit.utils.inside import is_inside
from dcdit.utils.outputs import check_not_read, check_own


def test_an_output_that_is_read_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(b"0")
    (tmp_path / "linked").symlink_to(tmp_path / "images")
    (tmp_path / "hard.png").hardlink_to(tmp_path / "images" / "0.png")
    for output, read in [
        ("images", "images"),
        ("images/out/deep", "images"),
        ("linked/out", "images"),
        ("images/out", "linked"),
        ("linked/0.png", "images/0.png"),
        ("hard.png", "images/0.png"),
        ("images/../images/0.png", "images/0.png"),
    ]:
        with pytest.raises(ValueError, match=r"^\S+ is where --images is read from; accepted: "):
            check_not_read(tmp_path / output, {"--reference": None, "--images": tmp_path / read})
    for output in ("out", "images2", "."):
        check_not_read(tmp_path / output, {"--images": tmp_path / "images", "--reference": str(tmp_path / "none.npz")})


def test_files_of_somebody_else_are_refused(tmp_path):
    def check():
        check_own(tmp_path, "record.json", ("runs", "model"), ("a.png", "b.png"))

    (tmp_path / "other.png").write_text("mine")
    check()
    (tmp_path / "b.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"b\.png is already there and would be replaced; accepted: another --out$"):
        check()
    for record in ("", "[]", "{}", '{"runs": []}', "\x00"):
        (tmp_path / "record.json").write_text(record)
        with pytest.raises(ValueError, match=r"record\.json is already there"):
            check()
    (tmp_path / "record.json").write_text(json.dumps({"runs": [], "model": "", "more": 1}))
    check()


def test_names_inside_a_folder():
    assert all(map(is_inside, ("a.npy", "00/a.npy", "./a", "..a", "a..")))
    assert not any(map(is_inside, ("../a", "a/../../b", "/etc/passwd", "..", None, 3)))
