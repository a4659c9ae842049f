"""From image files to RGB pixels. Training, extraction and evaluation all read images here, and see the same pixels.

What a file holds becomes 8-bit RGB by these rules:

- 16 bits per channel: the upper 8 bits. Other numbers (32 bits, floating point) have no known range and are refused.
- Transparency: composed on white.
- Palettes, grayscale and CMYK: as Pillow converts them. Colour profiles are ignored.
- Several frames: the first.
- EXIF orientation: applied, so that an image is upright as in any viewer. (ADM and most FID code ignore it.)
"""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from dcdit.data.samples import DamagedFile
from dcdit.utils.reading import BEGINNING, kind_of, kind_of_file, open_regular
from dcdit.utils.text import one_line

if TYPE_CHECKING:
    from PIL import Image

RULES = 2
"""Number of these rules. It changes whenever the pixels of any image do. (Rules 1 had no orientation, and clipped.)"""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""The formats of Pillow that are tried, whatever the name of a file. Others may start programs such as Ghostscript."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm")
"""Of image files, in small or capital letters."""
FREE_PIXELS, PIXELS_PER_BYTE = 1 << 24, 10_000
"""A file that claims more pixels than the first, and more per byte than the second, is refused before it is decoded."""
LONGEST = 100
"""An image may be so many times longer than wide, or wider than long."""
TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
"""Modes of Pillow that have transparency in every pixel."""

ORIENTATION = 0x0112
"""The EXIF tag."""
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""Its values to the method of Pillow that makes the image upright."""


@dataclass(frozen=True)
class ImageBytes:
    """The content of an image file that is part of another one, such as a shard."""

    name: str
    """For messages."""
    content: bytes

    def __str__(self) -> str:
        return self.name


ImageFile = Path | ImageBytes


def read_image(path: ImageFile, draft: tuple[int, int] | None = None) -> "Image.Image":
    """The image in a file as 8-bit RGB, upright.

    Args:
        draft: a JPEG may be shrunk while it is decoded, by 2, 4 or 8, as long as it keeps this size.

    Raises:
        DamagedFile: it cannot be read, or is far longer than wide.
    """
    from dcdit.utils.pillow import Image

    with open_image(path) as image:
        width, height = image.size
        if max(width, height) > LONGEST * min(width, height):
            raise DamagedFile(
                f"cannot read image {str(path)!r}: it has {width}x{height} pixels; accepted: one side at most "
                f"{LONGEST} times the other"
            )
        if draft is not None:
            image.draft("RGB", draft)
        turn = None if image.format == "TIFF" else TURNS.get(_orientation(image))  # Pillow turns TIFF when it loads
        rgb = _to_rgb(image, path)
    return rgb if turn is None else rgb.transpose(Image.Transpose[turn])


def count_turned(files: Sequence[Path]) -> int:
    """How many images have an EXIF orientation other than upright. Reads headers only; damaged files do not count."""
    return sum(map(_is_turned, files))


@contextmanager
def open_image(path: ImageFile) -> Iterator["Image.Image"]:
    """The image in a file as Pillow opens it.

    Raises:
        DamagedFile: whatever goes wrong in Pillow while it is open.
    """
    from dcdit.utils.pillow import Image, UnidentifiedImageError

    try:
        with _opened(path) as (file, size), Image.open(file, formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > max(FREE_PIXELS, PIXELS_PER_BYTE * size):
                raise DamagedFile(f"cannot read image {str(path)!r}: {size} bytes cannot hold its {pixels} pixels")
            yield image
    except (DamagedFile, NameError):  # the second is a fault of the program
        raise
    except UnidentifiedImageError:
        known = kind_of(path.content[:BEGINNING]) if isinstance(path, ImageBytes) else kind_of_file(path)
        reason = f"{known or 'it is damaged or of another format'}; accepted: {', '.join(FORMATS)}"
        raise DamagedFile(f"cannot read image {str(path)!r}: {reason}") from None
    except Exception as error:  # a damaged file raises anything in Pillow's decoders
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise DamagedFile(f"cannot read image {str(path)!r}: {reason}") from None


@contextmanager
def _opened(path: ImageFile) -> Iterator[tuple[IO[bytes], int]]:
    """The open file, and how many bytes it has."""
    if isinstance(path, ImageBytes):
        yield io.BytesIO(path.content), len(path.content)
        return
    with open_regular(path) as file:
        yield file, os.fstat(file.fileno()).st_size


def _to_rgb(image: "Image.Image", path: ImageFile) -> "Image.Image":
    from dcdit.utils.pillow import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = _upper_bits(image)
    if image.mode in ("I", "F"):
        raise DamagedFile(f"cannot read image {str(path)!r}: it has 32 bits per channel; accepted: 8 or 16")
    if image.mode not in TRANSPARENT and "transparency" not in image.info:
        return image.convert("RGB")
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # the transparent colour of 16-bit RGB, which Pillow has shortened
        image.info["transparency"] = tuple(value >> 8 for value in key)
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _upper_bits(image: "Image.Image") -> "Image.Image":
    """Grayscale of 16 bits as 8 bits. Pillow would clip it; of 16-bit RGB it takes the upper bits by itself."""
    from dcdit.utils.pillow import Image

    tags = getattr(image, "tag_v2", {})  # of TIFF: BitsPerSample may be 12, and WhiteIsZero is not undone by Pillow
    bits, white_is_zero = tags.get(258, (16,))[0], tags.get(262) == 0
    values = np.asarray(image)
    gray = (values >> (bits - 8)).astype(np.uint8)
    gray = 255 - gray if white_is_zero else gray
    transparent = image.info.get("transparency")
    return Image.fromarray(gray if transparent is None else np.where(values == transparent, np.uint8(255), gray))


def _orientation(image: "Image.Image") -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data raises anything; the image is good
        return 1


def _is_turned(path: Path) -> bool:
    try:
        with open_image(path) as image:
            # Pillow decodes a whole PNG to look for EXIF data behind the pixels, where hardly any program writes them.
            return (image.format != "PNG" or "exif" in image.info) and _orientation(image) in TURNS
    except (DamagedFile, NameError):  # the second is a fault of the program
        return False
