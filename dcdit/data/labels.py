"""Labels as they come from files."""

from typing import Any

import numpy as np

from dcdit.data.samples import DamagedFile

Array = np.ndarray[Any, Any]
MAX_CLASSES = 1 << 20
"""A label at or above this is none: ``-1`` stored without a sign, for example."""


def as_labels(labels: Array, count: int, source: str, classes: int = MAX_CLASSES) -> Array:
    """Labels as int64 (N,).

    Args:
        labels: as stored.
        count: N.
        source: the file, for error messages.
        classes: number of classes, if it is known. Labels are below it.

    Raises:
        DamagedFile: another shape, no integers, or a label out of range, which is named.
    """
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise DamagedFile(
            f"{source}: labels are {labels.dtype} {labels.shape}; accepted: {count} integers of at least 0"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DamagedFile(
            f"{source}: label {labels[wrong[0]]} of item {wrong[0]} is out of range ({len(wrong)} such); "
            f"accepted: integers of at least 0 and below {classes}"
        )
    return labels.astype(np.int64)
