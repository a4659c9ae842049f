"""Folders of images."""

import os
from pathlib import Path

from tools.malformed import parts
from tools.malformed.base import Base
from tools.malformed.case import malformed

IMAGES = "image folder"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"


def measured(base: Base, out: Path, data: bytes, name: str = "00.png") -> list[str]:
    """The images with another content of the first one, as ``dcdit evaluate`` reads them."""
    folder = base.copy_of_images(out)
    parts.write(folder / name, data)
    return base.evaluate(folder, out)


def trained(base: Base, out: Path, folder: Path, *options: str) -> list[str]:
    pixels = ["model.overrides.in_channels=3", "model.overrides.grid=[16,16]", "data.size=16", *options]
    return base.train_on("folder", folder, out, *(word for option in pixels for word in ("--set", option)))


@malformed(IMAGES, "00.png", "1x60000 pixels; accepted: one side at most 100 times the other")
def image_of_1_by_60000(base: Base, out: Path) -> list[str]:
    folder = base.copy_of_images(out)
    parts.write(folder / "00.png", parts.png(1, 60_000))
    return base.extract(folder, base.vae, out)


@malformed(IMAGES, "00.png", "cannot hold its 400000000 pixels|decompression bomb")
def image_of_400_million_pixels(base: Base, out: Path) -> list[str]:
    return measured(base, out, parts.png(20_000, 20_000, bytes(100)))


@malformed(IMAGES, "00.png", "cannot hold its 100000000 pixels")
def image_of_100_million_pixels(base: Base, out: Path) -> list[str]:
    return measured(base, out, parts.png(10_000, 10_000, bytes(100)))


@malformed(IMAGES, "00.png", "another format; accepted: PNG")
def image_is_postscript(base: Base, out: Path) -> list[str]:
    return measured(base, out, EPS)


@malformed(IMAGES, "00.png", "it is empty; accepted")
def image_is_empty(base: Base, out: Path) -> list[str]:
    return measured(base, out, b"")


@malformed(IMAGES, "00.png", "Git LFS pointer")
def image_is_a_pointer(base: Base, out: Path) -> list[str]:
    return measured(base, out, parts.POINTER)


@malformed(IMAGES, "00.png", "cannot read image")
def image_cut_short(base: Base, out: Path) -> list[str]:
    return measured(base, out, (base.images / "00.png").read_bytes()[:300])


@malformed(IMAGES, "forged", "cannot read image")
def image_name_with_escape_codes(base: Base, out: Path) -> list[str]:
    return measured(base, out, b"", "forged" + parts.FORGED + ".png")


@malformed(IMAGES, "00.png", "named pipe")
def image_is_a_pipe(base: Base, out: Path) -> list[str]:
    folder = base.copy_of_images(out)
    (folder / "00.png").unlink()
    os.mkfifo(folder / "00.png")
    return base.evaluate(folder, out)


@malformed(IMAGES, "images/", "cannot read image")
def image_to_train_on_is_damaged(base: Base, out: Path) -> list[str]:
    folder = base.copy_of_images(out)
    for file in folder.iterdir():
        parts.write(file, b"nothing")
    return trained(base, out, folder)


@malformed(IMAGES, "0", "skipped: cannot read image .* so far", skipped=True)
def images_are_left_out(base: Base, out: Path) -> list[str]:
    folder = base.copy_of_images(out)
    for number in range(6):
        parts.write(folder / f"{number:02d}.png", EPS)
    return trained(base, out, folder, "data.skip_damaged=true")


@malformed(IMAGES, "images.npy", "Python objects")
def image_array_runs_code(base: Base, out: Path) -> list[str]:
    import numpy as np

    from tools.malformed.running import MARK

    data = parts.npy(np.array([parts.Runs(out / MARK)], object), pickled=True)
    parts.write(out / "arrays" / "images.npy", data)
    return base.evaluate(out / "arrays", out)
