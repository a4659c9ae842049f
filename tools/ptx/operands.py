"""Operands of instructions as numbers: the type that an opcode names, how to read it and how to write it."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx.machine import Step, Threads
from tools.ptx.memory import MachineError
from tools.ptx.number import HALVES
from tools.ptx.program import Instruction

Array = NDArray[np.generic]

TYPES = {
    "pred": np.dtype(bool),
    **{f"u{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"b{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"s{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}


def type_of(instruction: Instruction) -> np.dtype[Any]:
    return TYPES[instruction.opcode[-1]]


def check_qualifiers(instruction: Instruction, *qualifiers: str) -> None:
    """Refuse qualifiers that would change the meaning."""
    unknown = set(instruction.opcode[1:-1]) - set(qualifiers)
    if unknown:
        raise MachineError(f"unknown qualifiers {sorted(unknown)}: {instruction.text}")


def elementwise(function: Callable[..., Array], *qualifiers: str) -> Callable[[Instruction], Step]:
    """``d = function(a, b, ...)``, all of the type that the opcode ends with."""

    def make(instruction: Instruction) -> Step:
        kind, (target, *sources) = instruction.opcode[-1], instruction.operands
        if instruction.opcode[-2] == "f32" and kind in ("bf16", "f16"):
            # float32 arithmetic; all operands but the last are 16-bit floats
            check_qualifiers(instruction, *qualifiers, "f32")
            narrow = reader(kind)
            readers = [lambda state, source: narrow(state, source).astype(np.float32)] * (len(sources) - 1)
            readers.append(reader("f32"))
            write = writer("f32")
        else:
            check_qualifiers(instruction, *qualifiers)
            readers, write = [reader(kind)] * len(sources), writer(kind)

        def step(state: Threads) -> None:
            values = [read(state, source) for read, source in zip(readers, sources, strict=True)]
            write(state, target, function(*values))

        return step

    return make


_PACKED = {
    "bf16": (np.uint16, np.uint16, *HALVES["bf16"]),
    "bf16x2": (np.uint32, np.uint16, *HALVES["bf16"]),
    "f16x2": (np.uint32, np.uint16, *HALVES["f16"]),
    "f32x2": (np.uint64, np.float32, np.asarray, np.asarray),
}
"""Registers that hold several numbers, or numbers that numpy does not have: type of the register, type of a part, how
to read a part and how to write it. Arithmetic runs in float32, which holds a product of two 16-bit floats exactly,
so results are rounded once."""


def reader(kind: str) -> Callable[[Threads, str], Array]:
    if kind not in _PACKED:
        return lambda state, source: state.read(source, TYPES[kind])
    register, part, decode, _ = _PACKED[kind]
    return lambda state, source: decode(np.array(state.read(source, register)).view(part))


def writer(kind: str) -> Callable[[Threads, str, Array], None]:
    if kind not in _PACKED:
        return lambda state, target, value: state.write(target, value.astype(TYPES[kind], copy=False))
    register, _, _, encode = _PACKED[kind]
    return lambda state, target, value: state.write(target, encode(value.astype(np.float32)).view(register))
