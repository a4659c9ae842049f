"""From a row of a shard to an image or a latent, and its label."""

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dcdit.data.archives import parse_npy
from dcdit.data.decode import ImageBytes
from dcdit.data.labels import MAX_CLASSES
from dcdit.data.latents.store import as_latent
from dcdit.data.samples import DamagedFile
from dcdit.data.stream.shards import Row
from dcdit.utils.schema import did_you_mean
from dcdit.utils.text import one_line, printable, short

VALUES = ("image", "img", "jpg", "jpeg", "png", "webp", "latent", "latents", "npy", "latent.npy", "latents.npy")
LABELS = ("label", "labels", "cls", "class", "class_id")
"""Names by which columns are known."""


@dataclass(frozen=True)
class Columns:
    """What a row holds, and where."""

    value: str
    """Column of the image or the latent."""
    label: str
    """Column of the label."""
    class_names: tuple[str, ...]

    def label_of(self, row: Row, source: str) -> int:
        """The label of a row. DamagedFile if it is none of the classes.

        Args:
            source: of the row, for messages.
        """
        stored = row.get(self.label)
        label = stored.decode("utf-8", "replace").strip() if isinstance(stored, bytes) else stored
        if isinstance(label, str):
            label = self._number.get(label, int(label) if label.isascii() and label.isdecimal() else label)
        if type(label) is not int or not 0 <= label < len(self.class_names):
            accepted = f"0 to {len(self.class_names) - 1}, or names listed in data.classes"
            raise DamagedFile(f"{source}: {self.label} is {short(stored)}; accepted: {accepted}")
        return label

    def value_of(self, row: Row, source: str) -> ImageBytes | Tensor:
        """The file of an image, or a latent, float32 (C, H, W). DamagedFile if the row holds neither.

        A path is refused: a shard does not decide which other file is read.
        """
        stored: Any = row.get(self.value)
        if isinstance(stored, dict):
            if stored.get("bytes") is None and stored.get("path") is not None:
                raise DamagedFile(
                    f"{source}: {self.value} is the path {short(stored['path'])}; accepted: the content of an image"
                )
            stored = stored.get("bytes")
        if isinstance(stored, bytes):
            if not stored.startswith(np.lib.format.MAGIC_PREFIX):
                return ImageBytes(f"{source}, {self.value}", stored)
            npy = stored
            stored = _checked(lambda: parse_npy(io.BytesIO(npy), len(npy)), source)
        if not isinstance(stored, list | np.ndarray):
            raise DamagedFile(f"{source}: {self.value} is {short(stored)}; accepted: an image file, or a latent")
        return as_latent(_checked(lambda: np.asarray(stored), source), f"{source}, {self.value}")

    @functools.cached_property
    def _number(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.class_names)}


def _checked(read: Callable[[], Any], source: str) -> Any:
    try:
        return read()
    except ValueError as error:
        raise DamagedFile(f"{source}: {one_line(error)}") from None


def find_columns(
    features: dict[str, Any],
    path: str,
    column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
) -> Columns:
    """The columns of a stream.

    Args:
        features: column to its type, as ``datasets`` describes it.
        path: of the stream, for messages.
        column: of images or latents. By default the only one of type Image, or with one of the usual names.
        label_column: of labels. By default the only one of type ClassLabel, or with one of the usual names.
        classes: names of all classes. By default those that the ClassLabel has.
        num_classes: number of classes, where nobody names them.

    Raises:
        ValueError: no such column, or several; or nobody says how many classes there are.
    """
    value = _find(features, path, "data.column", column, "Image", VALUES)
    label = _find(features, path, "data.label_column", label_column, "ClassLabel", LABELS)
    names = tuple(classes or getattr(features[label], "names", None) or ())
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: two classes of {label!r} have one name; accepted: a name for each in data.classes")
    if names and num_classes is not None and len(names) > num_classes:
        raise ValueError(f"{path} has {len(names)} classes; model.num_classes is {num_classes}")
    if not names and num_classes is None:
        raise ValueError(
            f"{path}: nothing says how many classes column {label!r} has; accepted: model.num_classes, or their names "
            "in data.classes"
        )
    if not names and num_classes is not None:
        names = tuple(map(str, range(num_classes)))
    if len(names) > MAX_CLASSES:
        raise ValueError(f"{path} has {len(names)} classes; accepted: at most {MAX_CLASSES}")
    return Columns(value, label, names)


def _find(features: dict[str, Any], path: str, key: str, wanted: str | None, kind: str, usual: Sequence[str]) -> str:
    shown = ", ".join(map(printable, features))
    if wanted is not None:
        if wanted not in features:
            raise ValueError(
                f"{path} has no column {wanted!r} ({key}); accepted: {shown}{did_you_mean(wanted, features)}"
            )
        return wanted
    typed = [name for name, feature in features.items() if type(feature).__name__ == kind]
    found = typed or [name for name in features if name.lower() in usual]
    if len(found) != 1:
        what = f"several columns may be it ({', '.join(found)})" if found else "no column has a usual name"
        raise ValueError(f"{path}: {key} is null and {what}; accepted: one of {shown}")
    return found[0]
