"""What an image file becomes: the same pixels for training, extraction and evaluation, by value, upright, on white."""

import os
import signal
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dcdit.data import ImageFolder
from dcdit.data.decode import FORMATS, read_image
from dcdit.data.folder import read_centre, read_rgb, read_square
from dcdit.data.samples import DamagedFile
from dcdit.evaluate.images import open_images

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
WHITE = 255


def png(values, colour_type, *chunks):
    """A PNG of 16 bits per channel, which Pillow cannot write in colour."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(data, width, height, bits, photometric):
    """An uncompressed grayscale TIFF; Pillow writes neither 12 bits nor white as zero."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    padded = data + b"\0" * (len(data) % 2)
    return struct.pack("<2sHI", b"II", 42, 8 + len(padded)) + padded + struct.pack("<H", len(tags)) + entries + bytes(4)


def read(path, content):
    path.write_bytes(content)
    return read_rgb(path)


# --- bits -----------------------------------------------------------------------------------------------------------

DEEP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big.tif", "a.pgm"])
def test_grayscale_of_16_bits_keeps_its_upper_8(tmp_path, name):
    file = tmp_path / name
    if name == "a.pgm":
        file.write_bytes(b"P5 256 256 65535\n" + DEEP.astype(">u2").tobytes())
    else:
        Image.fromarray(DEEP.astype(">u2") if name == "big.tif" else DEEP).save(file)
    assert np.array_equal(read_rgb(file), np.repeat((DEEP >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize(("channels", "colour_type"), [(1, 0), (2, 4), (3, 2), (4, 6)], ids=["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("scale", [256, 257])
def test_an_image_reads_the_same_in_16_bits_as_in_8(tmp_path, channels, colour_type, scale):
    """However a program widened it: by a shift, or to the full range."""
    values = RNG.integers(0, 256, (6, 8, channels), dtype=np.uint8)
    if channels in (2, 4):
        values[..., -1] = 255
    wide = read(tmp_path / "wide.png", png(values.astype(np.uint16) * scale, colour_type))
    Image.fromarray(values.squeeze()).save(tmp_path / "a.png")
    assert np.array_equal(wide, read_rgb(tmp_path / "a.png"))
    assert np.array_equal(wide[..., 0], values[..., 0])


def test_tiff_of_12_bits_and_of_white_as_zero(tmp_path):
    values = RNG.integers(0, 4096, (4, 6), dtype=np.uint16)
    pairs = values.reshape(-1, 2).astype(np.uint32)
    packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4").tobytes()
    data = b"".join(packed[i + 1 : i + 4] for i in range(0, len(packed), 4))
    assert np.array_equal(read(tmp_path / "a.tif", tiff(data, 6, 4, 12, 1))[..., 0], values >> 4)
    data = values.astype("<u2").tobytes()
    assert np.array_equal(read(tmp_path / "b.tif", tiff(data, 6, 4, 16, 0))[..., 0], 255 - (values >> 8))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(DamagedFile, match=r"^cannot read image '.*a\.tif': it has 32 bits per channel; accepted: 8"):
        read_rgb(tmp_path / "a.tif")


# --- transparency ---------------------------------------------------------------------------------------------------


def test_transparency_is_composed_on_white(tmp_path):
    alpha = np.tile(np.array([0, 255, 100, 1, 254, 0, 255, 7], np.uint8), (6, 1))
    rgba = np.dstack([COLOURS, alpha])
    weight = alpha[..., None] / 255
    expected = weight * COLOURS + (1 - weight) * WHITE
    for name, options in (("a.png", {}), ("a.webp", {"lossless": True, "exact": True}), ("a.tif", {})):
        Image.fromarray(rgba).save(tmp_path / name, **options)
        found = read_rgb(tmp_path / name)
        assert np.abs(found - expected).max() <= 1, name
        assert (found[alpha == 0] == WHITE).all() and np.array_equal(found[alpha == 255], COLOURS[alpha == 255])
    Image.fromarray(rgba[..., [0, 3]]).save(tmp_path / "gray.png")
    assert np.abs(read_rgb(tmp_path / "gray.png") - expected[..., :1]).max() <= 1


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_a_transparent_colour_of_a_palette_is_white(tmp_path, name):
    index = np.arange(48, dtype=np.uint8).reshape(6, 8) % 5
    image = Image.fromarray(index, mode="P")
    image.putpalette(COLOURS.reshape(-1)[:15].tolist())
    image.save(tmp_path / name, transparency=2)
    expected = COLOURS.reshape(-1, 3)[:5].copy()
    expected[2] = WHITE
    assert np.array_equal(read_rgb(tmp_path / name), expected[index])


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_without_a_palette_is_white(tmp_path, depth):
    if depth == 8:
        Image.fromarray(COLOURS).save(tmp_path / "a.png", transparency=tuple(map(int, COLOURS[2, 3])))
        Image.fromarray(COLOURS[..., 0]).save(tmp_path / "g.png", transparency=int(COLOURS[2, 3, 0]))
    else:
        deep = COLOURS.astype(np.uint16) * 257
        key = struct.pack(">HHH", *map(int, deep[2, 3]))
        (tmp_path / "a.png").write_bytes(png(deep, 2, (b"tRNS", key)))
        (tmp_path / "g.png").write_bytes(png(deep[..., :1], 0, (b"tRNS", key[:2])))
    colour, gray = COLOURS.copy(), np.repeat(COLOURS[..., :1], 3, axis=2)
    colour[(COLOURS[2, 3] == COLOURS).all(2)] = WHITE
    gray[COLOURS[..., 0] == COLOURS[2, 3, 0]] = WHITE
    assert np.array_equal(read_rgb(tmp_path / "a.png"), colour)
    assert np.array_equal(read_rgb(tmp_path / "g.png"), gray)


# --- colours and frames -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_colours_are_those_of_pillow(tmp_path, mode):
    image = Image.fromarray(COLOURS).convert(mode)
    image.save(tmp_path / "a.tif")
    assert np.array_equal(read_rgb(tmp_path / "a.tif"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.webp", "a.png"])
def test_the_first_frame_is_read(tmp_path, name):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(
        tmp_path / name, save_all=True, append_images=frames[1:], **({"lossless": True} if "webp" in name else {})
    )
    assert np.array_equal(read_rgb(tmp_path / name), np.asarray(frames[0]))


# --- orientation ------------------------------------------------------------------------------------------------------

# From the stored pixels to the upright image, as the EXIF standard defines the values.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[:, ::-1].swapaxes(0, 1),
}


def save_turned(path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **({"lossless": True} if path.suffix == ".webp" else {}))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
def test_an_image_is_upright(tmp_path, suffix, orientation):
    file, plain = tmp_path / f"a{suffix}", tmp_path / f"plain{suffix}"
    save_turned(file, COLOURS, orientation)
    save_turned(plain, COLOURS, 1)
    expected = UPRIGHT[orientation](read_rgb(plain))
    assert np.array_equal(read_rgb(file), expected)
    Image.fromarray(expected).save(tmp_path / "upright.png")
    assert np.array_equal(read_centre(file, 6), read_centre(tmp_path / "upright.png", 6))
    assert np.array_equal(read_square(file, 6, 0.0), read_square(tmp_path / "upright.png", 6, 0.0))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0garbage that is no TIFF", b"Exif\0\0II*\0\xff\xff\xff\xff", b"x"]
)
def test_damaged_exif_data_do_not_damage_the_image(tmp_path, exif):
    Image.fromarray(COLOURS).save(tmp_path / "a.webp", lossless=True, exif=exif)
    assert np.array_equal(read_rgb(tmp_path / "a.webp"), COLOURS)


# --- one rule ---------------------------------------------------------------------------------------------------------


def test_training_extraction_and_evaluation_see_the_same_pixels(tmp_path):
    """Without cropping there is nothing left in which they could differ."""
    square = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    save_turned(tmp_path / "a.png", square, 6)
    (tmp_path / "b.png").write_bytes(png(square.astype(np.uint16) * 257, 2))
    Image.fromarray(np.dstack([square, square[..., 0]])).save(tmp_path / "c.png")
    (tmp_path / "d.png").write_bytes(png(square[..., :1].astype(np.uint16) * 257, 0))
    Image.fromarray(square).convert("P").save(tmp_path / "e.gif")
    with pytest.warns(UserWarning, match="with an EXIF orientation, which is applied: 1 of 5 images"):
        data = ImageFolder(tmp_path, 8, held_out=0, flip=False)
    for item, file in enumerate(data.files):
        pixels = read_rgb(file)
        seen = ((data.load(item, 0)[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(seen, pixels) and np.array_equal(read_centre(file, 8), pixels)
        for size in (None, 8):
            with pytest.warns(UserWarning, match="EXIF"):
                (evaluated,) = open_images(tmp_path, size).batches(5)
            assert np.array_equal(evaluated[item], pixels)


# --- files of strangers -----------------------------------------------------------------------------------------------


@pytest.fixture
def soon():
    """Fail instead of waiting for ever."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("form", ["TGA", "PCX", "ICO", "SGI", "EPS"])
def test_other_formats_are_not_tried_whatever_the_name(tmp_path, form, monkeypatch):
    file = tmp_path / "a.png"
    Image.fromarray(COLOURS).resize((16, 16)).save(file, format=form)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)  # calling it would be a TypeError
    accepted = ", ".join(FORMATS)
    with pytest.raises(DamagedFile) as error:
        read_rgb(file)
    assert str(error.value) == f"cannot read image '{file}': it is damaged or of another format; accepted: {accepted}"


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "JPEG"])
def test_accepted_formats_are_read_under_any_name(tmp_path, form):
    Image.fromarray(COLOURS).save(tmp_path / "a.JPEG", format=form, **({"lossless": True} if form == "WEBP" else {}))
    colours = np.asarray(Image.open(tmp_path / "a.JPEG").convert("RGB")) if form == "GIF" else COLOURS
    assert np.array_equal(read_rgb(tmp_path / "a.JPEG"), colours)


def test_only_regular_files_are_opened(tmp_path, soon):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    reasons = {
        "pipe": "no regular file",
        "zero": "no regular file",
        "folder": "no regular file but a folder",
        "lost": "No such file",
    }
    for name, reason in reasons.items():
        with pytest.raises(DamagedFile, match=rf"^cannot read image '.*{name}\.png': .*{reason}"):
            read_rgb(tmp_path / f"{name}.png")
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    assert np.array_equal(read_rgb(tmp_path / "link.png"), COLOURS)


def test_shapes_that_take_all_memory_are_refused(tmp_path):
    Image.new("L", (1, 60_000)).save(tmp_path / "line.png")
    for call in (read_rgb, lambda file: read_centre(file, 256), lambda file: read_square(file, 256, 0.5)):
        with pytest.raises(
            DamagedFile, match=r"line\.png': it has 1x60000 pixels; accepted: one side at most 100 times"
        ):
            call(tmp_path / "line.png")
    side = struct.pack(">I", 20_000)
    small = png(COLOURS.astype(np.uint16), 2)
    header = small[12:16] + side + side + small[24:29]
    (tmp_path / "bomb.png").write_bytes(small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:])
    with pytest.raises(DamagedFile, match=r"bomb\.png': .*400000000 pixels"):
        read_rgb(tmp_path / "bomb.png")
    for side, message in ((13_000, "bytes cannot hold its 169000000 pixels"), (4_000, "")):  # less costs little
        header = small[12:16] + struct.pack(">II", side, side) + small[24:29]
        (tmp_path / "cut.png").write_bytes(small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:])
        with pytest.raises(DamagedFile, match=rf"cut\.png': .*{message}"):
            read_rgb(tmp_path / "cut.png")
    Image.new("L", (5, 500)).save(tmp_path / "long.png")
    assert read_centre(tmp_path / "long.png", 64).shape == (64, 64, 3)
    with pytest.raises(DamagedFile, match=r"long\.png': it has 8192x819200 pixels when it is resized for size 8192"):
        read_centre(tmp_path / "long.png", 8192)
    with pytest.raises(ValueError, match="size is 1000000; accepted: 1 to 8192 pixels"):
        ImageFolder(tmp_path, 10**6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMATS)
def test_damage_anywhere_gives_an_image_or_one_error(tmp_path, form):
    Image.fromarray(COLOURS).save(tmp_path / "good", format=form)
    good = (tmp_path / "good").read_bytes()
    outcomes = set()
    for trial in range(150):
        data = bytearray(good[: RNG.integers(1, len(good))] if trial % 3 == 0 else good)
        for position in RNG.integers(0, len(data), RNG.integers(1, 4)):
            data[position] = RNG.integers(256)
        (tmp_path / "bad.png").write_bytes(data)
        try:
            outcomes.add(read_image(tmp_path / "bad.png").mode)
        except DamagedFile as error:
            assert str(error).startswith("cannot read image ") and "\n" not in str(error)
            outcomes.add("error")
    assert "error" in outcomes and outcomes <= {"RGB", "error"}
