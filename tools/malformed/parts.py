"""Pieces of broken files."""

import io
import json
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
"""What git leaves in the place of a large file."""
PAGE = b"<!DOCTYPE html><html><head><title>404</title></head></html>"
FORGED = "\x1b[31mdcdit: all is well\x1b[0m\n\u202egnp.txt"
"""A name with escape codes, a line end and a mark that turns the direction of writing."""


class Runs:
    """Unpickled, it makes a file: whoever finds that file has seen code of a stranger run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def write(file: Path, data: bytes | str) -> Path:
    """A file with this content."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return file


def write_json(file: Path, value: Any) -> Path:
    return write(file, json.dumps(value))


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header; ``length`` is what it claims the header to have."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def npy_header(shape: tuple[Any, ...], descr: str = "<f4") -> bytes:
    """The beginning of a ``.npy`` that claims an array of this shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def npy(array: Any, pickled: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array), allow_pickle=pickled)
    return file.getvalue()


def npz(file: Path, compressed: bool = False, **members: bytes) -> Path:
    """An ``.npz`` with these bytes as its ``.npy`` members."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file


def zeros(file: Path, member: str, size: int, start: bytes = b"") -> Path:
    """A zip with one member of ``size`` zeros (a multiple of 16 MB) behind ``start``, packed to a thousandth.

    Its checksum is wrong, so that it is made in no time; whoever unpacks it has unpacked all of it when that shows.
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    first = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)  # whole by itself
    data = first + block * (size >> 24) + packer.flush()
    name, total = member.encode(), len(start) + (size >> 24 << 24)
    common = struct.pack("<HHHHHIIIHH", 20, 0, zipfile.ZIP_DEFLATED, 0, 33, 0, len(data), total, len(name), 0)
    local = b"PK\x03\x04" + common + name + data
    entry = b"PK\x01\x02" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0)
    return write(file, local + entry + end)


def claim_size(file: Path, member: str, size: int) -> Path:
    """Let a zip say that its member has ``size`` bytes, in its directory."""
    data = bytearray(file.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(member.encode()))
    data[entry + 20 : entry + 28] = struct.pack("<II", size, size)
    return write(file, bytes(data))


def png(width: int, height: int, data: bytes | None = None) -> bytes:
    """A PNG of this size in black, or with ``data`` in the place of its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    pixels = bytes(3 * width + 1) * height if data is None else data
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")
