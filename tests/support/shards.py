"""Shards of small images or latents, each of which is known by its label or by its numbers."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from datasets import ClassLabel, Features, Image, Value
from PIL import Image as Pillow

FEATURES = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog", "fox"]), "id": Value("int64")})


def pixels(number: int) -> np.ndarray:
    """uint8 (8, 8, 3), other for every number."""
    return np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)


def latent(number: int) -> np.ndarray:
    """float32 (4, 8, 8), the number everywhere."""
    return np.full((4, 8, 8), number, np.float32)


def png(number: int) -> bytes:
    file = io.BytesIO()
    Pillow.fromarray(pixels(number)).save(file, "PNG")
    return file.getvalue()


def image_row(number: int) -> dict[str, Any]:
    return {"image": {"bytes": png(number), "path": None}, "label": number % 3, "id": number}


def write_parquet(file: Path, rows: list[dict[str, Any]], features: Features | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = None if features is None else features.arrow_schema
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    return file


def write_tar(file: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def image_shards(folder: Path, sizes: Sequence[int]) -> Path:
    """Parquet files of so many images each, numbered through."""
    first = 0
    for number, size in enumerate(sizes):
        write_parquet(folder / f"{number:02d}.parquet", [image_row(first + i) for i in range(size)], FEATURES)
        first += size
    return folder


def latent_shards(folder: Path, sizes: Sequence[int]) -> Path:
    """Parquet files of so many latents each, numbered through, with the label number % 3."""
    first = 0
    for number, size in enumerate(sizes):
        rows = [{"latent": latent(n).tolist(), "label": n % 3} for n in range(first, first + size)]
        write_parquet(folder / f"{number:02d}.parquet", rows)
        first += size
    return folder


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
