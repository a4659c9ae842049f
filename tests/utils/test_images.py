"""Sheets of samples: enlarged, labelled, and within bounds."""

import numpy as np
import pytest

from dcdit.utils.images import fitting, grid


def pixels(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, side, side, 3), dtype=np.uint8)


def test_small_images_are_enlarged_by_a_whole_factor() -> None:
    images = pixels(4, 32)
    sheet = np.asarray(grid(images, 2))
    assert sheet.shape == (4 + 2 * 128, 4 + 2 * 128, 3)
    assert (sheet[:128:4, :128:4] == images[0]).all() and (sheet[132 + 3 :: 4, 132 + 3 :: 4] == images[3]).all()
    assert (sheet[128:132] == 255).all()


@pytest.mark.parametrize(("count", "side", "columns"), [(50_000, 32, 224), (64, 300, 8), (1, 2048, 1)])
def test_large_sheets_are_not_enlarged(count: int, side: int, columns: int) -> None:
    sheet = grid(np.zeros((count, side, side, 3), dtype=np.uint8), columns)
    assert sheet.width == columns * (side + 4) - 4


def test_names_stand_below_images_and_beside_rows() -> None:
    images = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    plain, named = grid(images, 2), grid(images, 2, ["cat", "dog", "a name that is much wider than its image", "x"])
    assert named.width == plain.width and named.height == plain.height + 2 * 16
    assert (np.asarray(named)[128:144, :128] < 100).any(), "no text below the first image"
    rows = grid(images, 2, row_names=["run 0", "run 1"])
    margin = rows.width - plain.width
    assert margin > 20 and (np.asarray(rows)[:, :margin] < 100).any(), "no text beside the rows"
    assert (np.asarray(rows)[:128, margin : margin + 128] == 0).all()


def test_images_too_narrow_for_text_have_none() -> None:
    tiny = np.zeros((100, 32, 32, 3), dtype=np.uint8)
    assert grid(tiny, 100, ["cat"] * 100).height == 32


def test_a_name_is_cut_to_its_width() -> None:
    class Font:
        def getlength(self, text: str) -> float:
            return 10.0 * len(text)

    assert fitting("short", 50, Font()) == "short"
    assert fitting("longer", 50, Font()) == "long…"
