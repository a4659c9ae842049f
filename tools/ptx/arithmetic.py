"""Integer, logical and floating-point instructions."""

import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tools.ptx.machine import Step, Threads
from tools.ptx.memory import MachineError
from tools.ptx.operands import elementwise, type_of
from tools.ptx.program import Instruction

Array = NDArray[np.generic]
_WIDE = {2: 4, 4: 8}


def _fused(a: Array, b: Array, c: Array) -> Array:
    if a.dtype == np.float32:
        return a.astype(np.float64) * b + c
    return a * b + c


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // safe
    # PTX rounds toward zero, numpy rounds down.
    return quotient + ((quotient < 0) & (quotient * safe != a)) if a.dtype.kind == "i" else quotient


def _remainder(a: Array, b: Array) -> Array:
    return a - _divide(a, b) * b


def _high(a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    if bits == 64:
        return np.array([(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=True)], dtype=object).astype(a.dtype)
    wide = np.dtype(f"{a.dtype.kind}{_WIDE[a.dtype.itemsize]}")
    return (a.astype(wide) * b.astype(wide)) >> bits


def _make_multiply(instruction: Instruction) -> Step:
    kind = instruction.opcode[1] if len(instruction.opcode) > 2 else ""
    if kind == "wide":
        return _make_wide(instruction)
    if kind == "hi":
        return elementwise(_high, "hi")(instruction)
    return elementwise(np.multiply, "lo", "rn", "ftz")(instruction)


def _make_multiply_add(instruction: Instruction) -> Step:
    return _make_wide(instruction) if "wide" in instruction.opcode else elementwise(_fused, "lo", "rn")(instruction)


def _make_wide(instruction: Instruction) -> Step:
    """``mul.wide`` and ``mad.wide``: a product of twice the width."""
    dtype = type_of(instruction)
    wide = np.dtype(f"{dtype.kind}{_WIDE[dtype.itemsize]}")
    target, a, b, *c = instruction.operands

    def step(state: Threads) -> None:
        product = state.read(a, dtype).astype(wide) * state.read(b, dtype).astype(wide)
        state.write(target, product + state.read(c[0], wide) if c else product)

    return step


def _extreme(pick: np.ufunc, ignore: np.ufunc) -> Callable[[Instruction], Step]:
    def make(instruction: Instruction) -> Step:
        relu = "relu" in instruction.opcode
        of_floats = pick if "NaN" in instruction.opcode else ignore

        def function(*values: Array) -> Array:  # two, and three on sm_100
            found = functools.reduce(of_floats if values[0].dtype.kind == "f" else pick, values)
            return np.maximum(found, 0) if relu else found

        return elementwise(function, "NaN", "relu", "ftz")(instruction)

    return make


def _shift_left(a: Array, count: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(count >= bits, 0, a << np.minimum(count, bits - 1).astype(a.dtype))


def _shift_right(a: Array, count: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count >= bits, 0, shifted)


def _make_shift(function: Callable[[Array, Array], Array]) -> Callable[[Instruction], Step]:
    def make(instruction: Instruction) -> Step:
        dtype, (target, a, count) = type_of(instruction), instruction.operands

        def step(state: Threads) -> None:
            state.write(target, function(state.read(a, dtype), state.read(count, np.uint32)).astype(dtype))

        return step

    return make


def _make_funnel(instruction: Instruction) -> Step:
    target, low, high, count = instruction.operands
    if instruction.opcode[1:] != ("l", "wrap", "b32"):
        raise MachineError(f"unknown shift: {instruction.text}")

    def step(state: Threads) -> None:
        both = state.read(high, np.uint32).astype(np.uint64) << np.uint64(32) | state.read(low, np.uint32)
        by = (state.read(count, np.uint32) & np.uint32(31)).astype(np.uint64)
        state.write(target, ((both << by) >> np.uint64(32)).astype(np.uint32))

    return step


def _make_field(instruction: Instruction) -> Step:
    """``bfe``: bits ``start`` to ``start + length``, with the sign for signed types."""
    dtype, (target, a, start, length) = type_of(instruction), instruction.operands

    def step(state: Threads) -> None:
        value = state.read(a, f"u{dtype.itemsize}").astype(np.uint64)
        first, count = (state.read(x, np.uint32).astype(np.uint64) & np.uint64(255) for x in (start, length))
        field = (value >> first) & ((np.uint64(1) << count) - np.uint64(1))
        if dtype.kind == "i":
            sign = (count > 0) & (((field >> (np.maximum(count, 1) - np.uint64(1))) & np.uint64(1)) == 1)
            field = np.where(sign, field | ~((np.uint64(1) << count) - np.uint64(1)), field)
        state.write(target, field.astype(f"u{dtype.itemsize}"))

    return step


def _make_permute(instruction: Instruction) -> Step:
    target, a, b, selector = instruction.operands

    def step(state: Threads) -> None:
        octets = np.stack(
            [((state.read(x, np.uint32) >> np.uint32(8 * k)) & np.uint32(255)) for x in (a, b) for k in range(4)]
        )
        choice, out = state.read(selector, np.uint32), np.zeros(state.total, np.uint32)
        for k in range(4):
            pick = (choice >> np.uint32(4 * k)) & np.uint32(15)
            octet = np.take_along_axis(octets, (pick & np.uint32(7)).astype(np.int64)[None], 0)[0]
            sign = np.where(octet & np.uint32(128), np.uint32(255), np.uint32(0))
            out |= np.where(pick & np.uint32(8), sign, octet) << np.uint32(8 * k)
        state.write(target, out)

    return step


def _count_ones(a: Array) -> Array:
    return np.unpackbits(np.ascontiguousarray(a).view(np.uint8).reshape(a.size, -1), axis=1).sum(1)


ARITHMETIC: dict[str, Callable[[Instruction], Step]] = {
    "add": elementwise(np.add, "rn", "ftz"),
    "sub": elementwise(np.subtract, "rn", "ftz"),
    "mul": _make_multiply,
    "mad": _make_multiply_add,
    "fma": elementwise(_fused, "rn", "ftz"),
    "div": elementwise(_divide, "full", "rn", "ftz"),
    "rem": elementwise(_remainder),
    "min": _extreme(np.minimum, np.fmin),
    "max": _extreme(np.maximum, np.fmax),
    "neg": elementwise(np.negative, "ftz"),
    "abs": elementwise(np.abs, "ftz"),
    "and": elementwise(np.bitwise_and),
    "or": elementwise(np.bitwise_or),
    "xor": elementwise(np.bitwise_xor),
    "not": elementwise(np.invert),
    "popc": elementwise(_count_ones),
    "shl": _make_shift(_shift_left),
    "shr": _make_shift(_shift_right),
    "shf": _make_funnel,
    "bfe": _make_field,
    "prmt": _make_permute,
    "ex2": elementwise(np.exp2, "approx", "ftz"),
    "lg2": elementwise(np.log2, "approx", "ftz"),
    "rcp": elementwise(np.reciprocal, "approx", "rn", "ftz"),
    "sqrt": elementwise(np.sqrt, "approx", "rn", "ftz"),
    "rsqrt": elementwise(lambda x: 1 / np.sqrt(x), "approx", "ftz"),
}
