"""Sets of images to evaluate, read batch by batch, and the ``.npz`` of ADM's evaluation suite."""

import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dcdit.data.archives import Header, map_npy, open_npz
from dcdit.data.folder import check_size, image_files, read_centre, read_rgb
from dcdit.utils.files import atomically
from dcdit.utils.images import Pixels

ARRAYS = ("arr_0", "images")
"""Names of the images in an ``.npz``: of ADM, and of :class:`dcdit.data.NpzDataset`."""
BATCH_BYTES = 1 << 28
"""Batches of large images hold fewer of them, so that they have no more bytes than this."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one size.

    Attributes:
        name: for messages and reports.
        count: N.
        batches: called with a batch size, yields uint8 (batch, H, W, 3) in order. With large images a batch is smaller
            than asked for, and always of the same size.
    """

    name: str
    count: int
    batches: Callable[[int], Iterator[Pixels]]


ImageSource = ImageSet | np.ndarray[Any, Any] | Tensor | str | Path


def open_images(source: ImageSource, size: int | None = None) -> ImageSet:
    """A set of images from an array, an archive or a folder.

    Args:
        source: uint8 (N, H, W, 3) as array or tensor; an ``.npz`` that holds such an array as ``arr_0`` or ``images``;
            a ``.npy`` of it, or a folder with it as ``images.npy``; a folder of image files, in class folders or flat.
        size: crop the centre of every file of a folder to this many pixels per side, as ADM does. None takes the
            images as they are; they must all have one size.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no images, or images of another shape or type. Reading the batches also raises it, for a file that
            is no image or has another size than the first.
    """
    if isinstance(source, ImageSet):
        return source
    if isinstance(source, Tensor):
        source = source.cpu().numpy()
    if isinstance(source, np.ndarray):
        return _from_array(source, "array")
    path = Path(source)
    if path.suffix == ".npz":
        return _from_npz(path)
    file = path / "images.npy" if path.is_dir() else path
    if file.suffix == ".npy" and os.path.lexists(file):
        try:
            array = map_npy(file)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{file} is not readable as images: {reason}") from None
        return _from_array(array, str(path))
    if not path.exists():
        raise FileNotFoundError(f"no images at {str(path)!r}")
    if not path.is_dir():
        raise ValueError(f"{path} holds no readable images; accepted: .npz, .npy, or a folder")
    return _from_folder(path, size)


def write_npz(
    path: Path, count: int, batches: Iterable[Pixels], labels: Sequence[np.ndarray[Any, Any]] | None = None
) -> None:
    """Write images as ADM's ``.npz``: ``arr_0`` uint8 (N, H, W, 3), ``arr_1`` the labels (N,). Atomic.

    Args:
        count: N.
        batches: of images. Each goes to disk at once, so memory holds one of them.
        labels: in pieces; read after the last batch, so the iterator may fill the list.
    """

    def write(file: Path) -> None:
        remaining = iter(batches)
        first = next(remaining)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as array:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *first.shape[1:])}
                np.lib.format.write_array_header_1_0(array, header)
                array.write(first.tobytes())
                for batch in remaining:
                    array.write(batch.tobytes())
            if labels is not None:
                with archive.open("arr_1.npy", "w") as array:
                    np.lib.format.write_array(array, np.concatenate(labels))

    atomically(path, write)


def _from_array(array: np.ndarray[Any, Any], name: str) -> ImageSet:
    _check(array.shape, array.dtype, name)

    def batches(size: int) -> Iterator[Pixels]:
        size = _fitting(size, array.shape)
        for start in range(0, len(array), size):
            yield np.ascontiguousarray(array[start : start + size])

    return ImageSet(name, len(array), batches)


def _fitting(size: int, shape: Sequence[int]) -> int:
    """The batch size, or a smaller one for images (..., H, W, 3) that are large."""
    return max(1, min(size, BATCH_BYTES // math.prod(shape[-3:])))


def _check(shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
        raise ValueError(f"{name}: images are {dtype} {shape}; accepted: uint8 (N, H, W, 3)")
    if not math.prod(shape):
        raise ValueError(f"{name} holds no images: they are {shape}")


def _from_npz(path: Path) -> ImageSet:
    with open_npz(path) as archive:
        name = next((name for name in ARRAYS if name in archive), None)
        if name is None:
            raise ValueError(f"{path} holds {archive.names}; accepted: images as {' or '.join(ARRAYS)}")
        with archive.stream(name) as (header, _):
            _check_header(header, path)

    def batches(size: int) -> Iterator[Pixels]:
        size = _fitting(size, header.shape)
        with open_npz(path) as archive, archive.stream(name) as (found, file):
            if found != header:
                raise ValueError(f"{path} has changed while it was read")
            for start in range(0, header.shape[0], size):
                block = (min(size, header.shape[0] - start), *header.shape[1:])
                data = file.read(math.prod(block))
                if len(data) < math.prod(block):
                    raise ValueError(f"{path} ends before image {start + block[0]} of {header.shape[0]}")
                yield np.frombuffer(data, np.uint8).reshape(block)

    return ImageSet(str(path), header.shape[0], batches)


def npz_arrays(path: Path) -> list[str]:
    """Names of the arrays in an ``.npz``.

    Raises:
        FileNotFoundError, ValueError: no such file, or no archive.
    """
    with open_npz(path) as archive:
        return archive.names


def holds_images(path: Path) -> bool:
    """Whether an ``.npz`` has images in it, and not statistics alone."""
    return any(name in ARRAYS for name in npz_arrays(path))


def _check_header(header: Header, path: Path) -> None:
    _check(header.shape, header.dtype, str(path))
    if header.fortran:
        raise ValueError(f"{path}: images are in Fortran order; accepted: C order")


def _from_folder(path: Path, size: int | None) -> ImageSet:
    if size is not None:
        check_size(size)
    files, _, _ = image_files(path)

    def batches(count: int) -> Iterator[Pixels]:
        batch: list[Pixels] = []
        shape = None
        for file in files:
            image = read_rgb(file) if size is None else read_centre(file, size)
            shape = shape or image.shape
            if image.shape != shape:
                raise ValueError(
                    f"{file} is {image.shape[1]}x{image.shape[0]} pixels, {files[0].name} {shape[1]}x{shape[0]}; "
                    "accepted: images of one size, or --size to crop and resize them"
                )
            batch.append(image)
            if len(batch) == _fitting(count, shape):
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)

    return ImageSet(str(path), len(files), batches)
