"""Sets of images to evaluate, read batch by batch, and the ``.npz`` of ADM's evaluation suite."""

import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dcdit.data.folder import image_files, read_centre, read_rgb
from dcdit.utils.files import atomically
from dcdit.utils.images import Pixels

ARRAYS = ("arr_0", "images")
"""Names of the images in an ``.npz``: of ADM, and of :class:`dcdit.data.NpzDataset`."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one size.

    Attributes:
        name: for messages and reports.
        count: N.
        batches: called with a batch size, yields uint8 (batch, H, W, 3) in order.
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
    if file.suffix == ".npy" and file.is_file():
        try:
            return _from_array(np.load(file, mmap_mode="r", allow_pickle=False), str(path))
        except ValueError as error:
            raise ValueError(f"{file} is not readable as images: {error}") from None
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
    return ImageSet(
        name, len(array), lambda size: (np.ascontiguousarray(array[i : i + size]) for i in range(0, len(array), size))
    )


def _check(shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
        raise ValueError(f"{name}: images are {dtype} {shape}; accepted: uint8 (N, H, W, 3)")
    if not shape[0]:
        raise ValueError(f"{name} holds no images")


def _from_npz(path: Path) -> ImageSet:
    names = npz_arrays(path)
    if not holds_images(path):
        raise ValueError(f"{path} holds {names}; accepted: images as {' or '.join(ARRAYS)}")
    member = f"{next(name for name in ARRAYS if name in names)}.npy"
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        shape = _header(file, path)

    def batches(size: int) -> Iterator[Pixels]:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            _header(file, path)
            for start in range(0, shape[0], size):
                block = (min(size, shape[0] - start), *shape[1:])
                data = file.read(math.prod(block))
                if len(data) < math.prod(block):
                    raise ValueError(f"{path} ends before image {start + block[0]} of {shape[0]}")
                yield np.frombuffer(data, np.uint8).reshape(block)

    return ImageSet(str(path), shape[0], batches)


def npz_arrays(path: Path) -> list[str]:
    """Names of the arrays in an ``.npz``.

    Raises:
        FileNotFoundError, ValueError: no such file, or no archive.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not readable as .npz: {' '.join(str(error).split())}") from None


def holds_images(path: Path) -> bool:
    """Whether an ``.npz`` has images in it, and not statistics alone."""
    return any(name in ARRAYS for name in npz_arrays(path))


def _header(file: Any, path: Path) -> tuple[int, ...]:
    """Read the header of an array in a file; returns the shape. The data come next."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise ValueError(f"{path} is not readable as .npz: {' '.join(str(error).split())}") from None
    _check(shape, dtype, str(path))
    if fortran:
        raise ValueError(f"{path}: images are in Fortran order; accepted: C order")
    return shape


def _from_folder(path: Path, size: int | None) -> ImageSet:
    files, _, _ = image_files(path)

    def batches(count: int) -> Iterator[Pixels]:
        shape = None
        for start in range(0, len(files), count):
            batch = []
            for file in files[start : start + count]:
                image = read_rgb(file) if size is None else read_centre(file, size)
                shape = shape or image.shape
                if image.shape != shape:
                    raise ValueError(
                        f"{file} is {image.shape[1]}x{image.shape[0]} pixels, {files[0].name} {shape[1]}x{shape[0]}; "
                        "accepted: images of one size, or --size to crop and resize them"
                    )
                batch.append(image)
            yield np.stack(batch)

    return ImageSet(str(path), len(files), batches)
