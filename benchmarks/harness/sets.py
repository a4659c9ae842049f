"""Which sizes are timed: a reduced set on a CPU, more on a GPU, everything with DCDIT_BENCH=full."""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from dcdit.models.presets import LATENT_STRIDE, SCALES
from dcdit.profiling.workloads import Operation, Shape

SETS = ("tiny", "reduced", "gpu", "full")
DIRECTIONS = ("forward", "forward+backward")
MODEL_DIRECTIONS = ("inference", "training")
OP_SCALES = ("S", "B", "XL")
OP_SIZES = (256, 512, 1024)
KEPT = (0.1, 0.25, 0.5)
_REDUCED = (("S", 256, 0.25), ("XL", 256, 0.25), ("S", 512, 0.25), ("S", 1024, 0.25))


def case_id(*parts: object) -> str:
    """The name of a case, without spaces. Results of two versions are compared by these names, so they stay."""
    return "-".join(map(str, parts)).replace(" ", "-")


class OpSize(NamedTuple):
    """A size at which operations are timed."""

    label: str
    shape: Shape
    compiled: tuple[str, ...]
    """Directions in which the compiled plain formulation is timed, too. Compiling takes longer than all the rest."""


class ModelRun(NamedTuple):
    """A model at one size and batch, in one direction."""

    scale: str
    size: int
    batch: int
    direction: str


def chosen_set() -> str:
    """``DCDIT_BENCH``, else what suits the device.

    Raises:
        ValueError: an unknown set.
    """
    name = os.environ.get("DCDIT_BENCH") or ("gpu" if torch.cuda.is_available() else "reduced")
    if name not in SETS:
        raise ValueError(f"DCDIT_BENCH is {name!r}; accepted: {', '.join(SETS)}")
    return name


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def directions(operation: Operation) -> Sequence[str]:
    """The directions that an operation has."""
    return DIRECTIONS if operation.differentiable else DIRECTIONS[:1]


def op_sizes(name: str) -> Iterator[OpSize]:
    """The sizes of a set, the most important first."""
    if name == "tiny":
        yield OpSize("tiny", tiny_shape(), compiled=())
        return
    full = [(scale, size, keep) for size in OP_SIZES for scale in OP_SCALES for keep in KEPT]
    important = _REDUCED if name == "reduced" else [each for each in full if each[2] == 0.25 or each[:2] == ("XL", 256)]
    for scale, size, keep in full if name == "full" else important:
        side = size // LATENT_STRIDE
        width = SCALES[scale]["hidden_size"]
        # The same number of positions at every size, so that sizes compare.
        batch = (4 if device().type == "cpu" else 64) * 256**2 // size**2 or 1
        shape = Shape(batch, (side, side), width, keep, dtype(), device())
        first = (scale, size) == ("S", 256)
        compiled = DIRECTIONS[:first] if name == "reduced" else DIRECTIONS
        yield OpSize(f"{scale} {size}px keep {keep:g}", shape, compiled)


def model_runs(name: str) -> Iterator[ModelRun]:
    """The runs of a set, the most important first."""
    if name == "tiny":
        yield from (ModelRun("tiny", 128, 2, direction) for direction in MODEL_DIRECTIONS)
    elif name == "reduced":
        yield from (ModelRun(scale, 256, 2, "inference") for scale in ("S", "B"))
        yield ModelRun("S", 256, 2, "training")
    else:
        batches = (1, 8, 32, 128, 256) if name == "full" else (32, 1)
        sizes = (256, 512) if name == "full" else (256,)
        for direction in MODEL_DIRECTIONS:
            for size in sizes:
                for scale in ("XL", "S", "B", "L"):
                    yield from (ModelRun(scale, size, batch, direction) for batch in batches)


def tiny_shape() -> Shape:
    """So small that a call costs only the time of the host."""
    return Shape(2, (8, 8), 64, 0.5, dtype(), device())
