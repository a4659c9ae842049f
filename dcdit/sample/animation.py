"""A sampling run as an animated WebP: what the model expects, the router's probability and the kept tokens."""

from collections.abc import Sequence
from pathlib import Path

from dcdit.sample.frames import Frame
from dcdit.utils.files import atomically
from dcdit.utils.images import Pixels, fitting, resized
from dcdit.utils.pillow import Image, ImageDraw, ImageFont

TILE, GAP, MARGIN, LINE = 128, 6, 92, 22
"""Height of an image, distance between images, room for the names of the rows, height of a line of text. Pixels."""
PAPER, INK, FAINT = "white", "#1a1a1a", "#d8d8d8"
QUALITY = 70
"""Of the compression, 0 to 100; without loss, noise would take three times the space."""
FRAME_MS, LAST_MS = 150, 2000
"""How long a frame is shown, and the last one."""


def write_animation(path: Path, frames: Sequence[Frame], names: Sequence[str], title: str) -> None:
    """Write an animation that repeats for ever; columns are images, rows what there is to see of them.

    Args:
        path: of the file, ``.webp``.
        frames: of one run, see :func:`dcdit.sample.frames.frames`.
        names: written above the columns.
        title: of the run, written below.
    """
    pictures = [_draw(frame, names, title) for frame in frames]
    times = [FRAME_MS] * (len(pictures) - 1) + [LAST_MS]
    options = {"save_all": True, "append_images": pictures[1:], "duration": times, "loop": 0, "quality": QUALITY}
    atomically(path, lambda target: pictures[0].save(target, format="WEBP", **options))


def _draw(frame: Frame, names: Sequence[str], title: str) -> Image.Image:
    rows = {
        "expected\nimage": frame.images,
        "router's\nprobability": frame.prob_colors(),
        "kept\ntokens": frame.kept_tokens(),
    }
    height, width = frame.mask.shape[1:]
    tile = (round(TILE * width / height), TILE)
    left = [MARGIN + number * (tile[0] + GAP) for number in range(len(names))]
    size = (left[-1] + tile[0] + GAP, LINE + len(rows) * (TILE + GAP) + LINE + GAP)
    picture = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for x, name in zip(left, names, strict=True):
        draw.text((x + tile[0] / 2, LINE / 2), fitting(name, tile[0], font), INK, font, anchor="mm")
    for number, (row, pixels) in enumerate(rows.items()):
        top = LINE + number * (TILE + GAP)
        draw.multiline_text((MARGIN / 2, top + TILE / 2), row, INK, font, anchor="mm", align="center")
        for x, image in zip(left, _resized(pixels, tile), strict=True):
            picture.paste(image, (x, top))
    middle = size[1] - GAP - LINE / 2
    text = f"{title}   time {frame.t / 1000:.2f}   kept {frame.kept:.0%}"
    draw.text((MARGIN, middle), text, INK, font, anchor="lm")
    start, end = MARGIN + draw.textlength(f"{title}   time 0.00   kept 100%   ", font), size[0] - GAP
    draw.line((start, middle, end, middle), FAINT, 4)
    draw.line((start, middle, start + (end - start) * (1 - frame.t / 1000), middle), "#d9822b", 4)
    return picture


def _resized(pixels: Pixels, size: tuple[int, int]) -> list[Image.Image]:
    return [resized(Image.fromarray(image), size) for image in pixels]
