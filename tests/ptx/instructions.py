"""What each PTX instruction does, for the part of PTX that Triton emits for sm_80 and sm_90 (PTX ISA 8.7)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx.copies import copy_asynchronously
from ptx.machine import WARP, Step, Threads
from ptx.matrix import load_matrix, multiply, store_matrix
from ptx.memory import UNSIGNED, MachineError
from ptx.number import bfloat16, from_bfloat16, from_half, to_half
from ptx.program import Instruction

Array = NDArray[np.generic]
Operand = str | tuple[str, ...]

_TYPES = {
    "pred": np.dtype(bool),
    **{f"u{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"b{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"s{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}
_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_WIDE = {2: 4, 4: 8}


def translate(instruction: Instruction) -> Step | None:
    """A function that carries the instruction out; None for branches and returns, which move threads.

    Raises:
        MachineError: an instruction that is not known here.
    """
    name = instruction.opcode[0]
    if name in ("bra", "ret", "exit"):
        return None
    make = _INSTRUCTIONS.get(name)
    if make is None:
        raise MachineError(f"unknown instruction: {instruction.text}")
    return make(instruction)


def _type(instruction: Instruction) -> np.dtype[Any]:
    return _TYPES[instruction.opcode[-1]]


def _known(instruction: Instruction, *qualifiers: str) -> None:
    """Refuse qualifiers that would change the meaning."""
    unknown = set(instruction.opcode[1:-1]) - set(qualifiers)
    if unknown:
        raise MachineError(f"unknown qualifiers {sorted(unknown)}: {instruction.text}")


def _elementwise(function: Callable[..., Array], *qualifiers: str) -> Callable[[Instruction], Step]:
    """``d = function(a, b, ...)``, all of the type that the opcode ends with."""

    def make(instruction: Instruction) -> Step:
        kind, (target, *sources) = instruction.opcode[-1], instruction.operands
        if instruction.opcode[-2] == "f32" and kind in ("bf16", "f16"):
            # float32 arithmetic that takes all but its last operand in 16 bits
            _known(instruction, *qualifiers, "f32")
            narrow = _reader(kind)
            readers = [lambda state, source: narrow(state, source).astype(np.float32)] * (len(sources) - 1)
            readers.append(_reader("f32"))
            write = _writer("f32")
        else:
            _known(instruction, *qualifiers)
            readers, write = [_reader(kind)] * len(sources), _writer(kind)

        def step(state: Threads) -> None:
            values = [read(state, source) for read, source in zip(readers, sources, strict=True)]
            write(state, target, function(*values))

        return step

    return make


_PACKED = {
    "bf16": (np.uint16, np.uint16, from_bfloat16, bfloat16),
    "bf16x2": (np.uint32, np.uint16, from_bfloat16, bfloat16),
    "f16x2": (np.uint32, np.uint16, from_half, to_half),
    "f32x2": (np.uint64, np.float32, np.asarray, np.asarray),
}
"""Registers that hold several numbers, or numbers that numpy does not know: the register, a part of it, how to read
and to make that. Arithmetic is float32's, which holds a product of two 16-bit floats exactly: it is rounded once."""


def _reader(kind: str) -> Callable[[Threads, str], Array]:
    if kind not in _PACKED:
        return lambda state, source: state.read(source, _TYPES[kind])
    register, part, decode, _ = _PACKED[kind]
    return lambda state, source: decode(np.array(state.read(source, register)).view(part))


def _writer(kind: str) -> Callable[[Threads, str, Array], None]:
    if kind not in _PACKED:
        return lambda state, target, value: state.write(target, value.astype(_TYPES[kind], copy=False))
    register, _, _, encode = _PACKED[kind]
    return lambda state, target, value: state.write(target, encode(value.astype(np.float32)).view(register))


# --- integers and floats ----------------------------------------------------------------------------------------------


def _fused(a: Array, b: Array, c: Array) -> Array:
    if a.dtype == np.float32:
        return a.astype(np.float64) * b + c
    return a * b + c


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // safe
    # Rounds toward zero, not down.
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
        return _elementwise(_high, "hi")(instruction)
    return _elementwise(np.multiply, "lo", "rn", "ftz")(instruction)


def _make_multiply_add(instruction: Instruction) -> Step:
    return _make_wide(instruction) if "wide" in instruction.opcode else _elementwise(_fused, "lo", "rn")(instruction)


def _make_wide(instruction: Instruction) -> Step:
    """``mul.wide`` and ``mad.wide``: a product of twice the width."""
    dtype = _type(instruction)
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

        def function(a: Array, b: Array) -> Array:
            found = of_floats(a, b) if a.dtype.kind == "f" else pick(a, b)
            return np.maximum(found, 0) if relu else found

        return _elementwise(function, "NaN", "relu", "ftz")(instruction)

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
        dtype, (target, a, count) = _type(instruction), instruction.operands

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
    dtype, (target, a, start, length) = _type(instruction), instruction.operands

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


def _not(a: Array) -> Array:
    return ~a


def _count_ones(a: Array) -> Array:
    return np.unpackbits(np.ascontiguousarray(a).view(np.uint8).reshape(a.size, -1), axis=1).sum(1)


# --- moving, choosing, converting -------------------------------------------------------------------------------------


def _make_move(instruction: Instruction) -> Step:
    dtype, (target, source) = _type(instruction), instruction.operands
    if isinstance(target, tuple):  # a register cut into parts
        part = np.dtype(f"u{dtype.itemsize // len(target)}")

        def cut(state: Threads) -> None:
            parts = np.ascontiguousarray(state.read(source, dtype)).view(part).reshape(state.total, -1)
            for k, register in enumerate(target):
                state.write(register, parts[:, k].copy())

        return cut
    if isinstance(source, tuple):  # parts joined
        part = np.dtype(f"u{dtype.itemsize // len(source)}")

        def join(state: Threads) -> None:
            # The compiler fills up pairs with a register that nobody wrote and nobody will look at.
            nothing = np.full(state.total, np.iinfo(part).max, part)
            written = [state.read(x, part) if x in state.registers else nothing for x in source]
            state.write(target, np.stack(written, 1).view(dtype)[:, 0])

        return join
    if source == "global_smem":
        source = "0"

    def step(state: Threads) -> None:
        state.write(target, np.array(state.read(source, dtype)))

    return step


def _make_compare(instruction: Instruction) -> Step:
    how, dtype, (target, a, b) = instruction.opcode[1], _type(instruction), instruction.operands
    _known(instruction, how, "ftz")

    def step(state: Threads) -> None:
        x, y = state.read(a, dtype), state.read(b, dtype)
        if how in ("num", "nan"):
            unordered = np.isnan(x) | np.isnan(y)
            result = ~unordered if how == "num" else unordered
        elif how in _COMPARE:
            result = _COMPARE[how](x, y) & (~(np.isnan(x) | np.isnan(y)) if dtype.kind == "f" else True)
        elif how[:-1] in _COMPARE and how.endswith("u"):
            result = _COMPARE[how[:-1]](x, y) | np.isnan(x) | np.isnan(y)
        else:
            raise MachineError(f"unknown comparison: {instruction.text}")
        state.write(target, result)

    return step


def _make_select(instruction: Instruction) -> Step:
    dtype, (target, a, b, which) = _type(instruction), instruction.operands

    def step(state: Threads) -> None:
        state.write(target, np.where(state.read(which, bool), state.read(a, dtype), state.read(b, dtype)))

    return step


def _make_convert(instruction: Instruction) -> Step:
    *_, into, of = instruction.opcode
    _known(instruction, "rn", "rzi", "rni", "rmi", "rpi", "ftz", into)
    target, *sources = instruction.operands
    if into in ("bf16x2", "f16x2"):
        narrow = bfloat16 if into == "bf16x2" else to_half

        def pair(state: Threads) -> None:
            high, low = (narrow(state.read(source, np.float32)) for source in sources)
            state.write(target, np.stack([low, high], 1).view(np.uint32)[:, 0])

        return pair
    (source,) = sources

    def step(state: Threads) -> None:
        value = from_bfloat16(state.read(source, np.uint16)) if of == "bf16" else state.read(source, _TYPES[of])
        if into == "bf16":
            state.write(target, bfloat16(value))
            return
        dtype = _TYPES[into]
        if value.dtype.kind == "f" and dtype.kind in "iu":
            bounds = np.iinfo(dtype)
            rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
            rounded = next(rounding[q] for q in instruction.opcode if q in rounding)
            value = np.clip(rounded(np.nan_to_num(value.astype(np.float64))), float(bounds.min), float(bounds.max))
        state.write(target, value.astype(dtype))

    return step


# --- memory -----------------------------------------------------------------------------------------------------------


def _vector(operand: Operand) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _make_load(instruction: Instruction) -> Step:
    space, (target, address) = instruction.opcode[1], instruction.operands
    if space == "param":
        dtype, name = _type(instruction), str(address)[1:-1]

        def parameter(state: Threads) -> None:
            state.write(target, state.registers[name].astype(f"u{dtype.itemsize}").view(dtype))

        return parameter
    _known(instruction, space, "v2", "v4", "relaxed", "gpu")
    size, registers = _type(instruction).itemsize, _vector(target)

    def step(state: Threads) -> None:
        place, mask = state.address(str(address))[state.mask], state.mask
        if space == "global":
            values = state.memory.load(state.warp[mask], place, len(registers), size)
        else:
            values = state.shared.load(state.block[mask], state.warp[mask], place, len(registers), size)
        for register, value in zip(registers, values, strict=True):
            state.write_some(register, value)

    return step


def _make_store(instruction: Instruction) -> Step:
    space, (address, source) = instruction.opcode[1], instruction.operands
    _known(instruction, space, "v2", "v4", "relaxed", "gpu")
    size, registers = _type(instruction).itemsize, _vector(source)

    def step(state: Threads) -> None:
        place, mask = state.address(str(address))[state.mask], state.mask
        values = [np.ascontiguousarray(state.read(register, UNSIGNED[size])[mask]) for register in registers]
        if space == "global":
            state.memory.store(state.warp[mask], place, values, size)
        else:
            state.shared.store(state.block[mask], state.warp[mask], place, values, size)

    return step


def _make_atomic(instruction: Instruction) -> Step:
    """Atomics whose result nobody reads: it is left unwritten, and reading it is an error."""
    how, dtype = instruction.opcode[-2], _type(instruction)
    combine = {"min": np.minimum, "max": np.maximum, "add": np.add}[how]
    _known(instruction, "global", "gpu", "relaxed", how)
    _, address, source = instruction.operands

    def step(state: Threads) -> None:
        value = np.ascontiguousarray(state.read(source, dtype)[state.mask])
        place = state.address(str(address))[state.mask]
        state.memory.update(state.warp[state.mask], place, value, combine, dtype)

    return step


# --- threads among themselves -----------------------------------------------------------------------------------------


def _make_barrier(instruction: Instruction) -> Step:
    if instruction.opcode == ("bar", "warp", "sync"):
        return lambda state: state.whole_warps()
    if instruction.opcode != ("bar", "sync") or instruction.operands != ("0",):
        raise MachineError(f"unknown barrier: {instruction.text}")
    return Threads.barrier


def _make_shuffle(instruction: Instruction) -> Step:
    target, source, offset, clamp, members = instruction.operands
    how = instruction.opcode[2]
    if members != "-1" or how not in ("bfly", "up", "down", "idx"):
        raise MachineError(f"unknown shuffle: {instruction.text}")

    def step(state: Threads) -> None:
        threads = state.whole_warps()
        value = state.read(source, np.uint32)
        lane = np.arange(WARP)
        by, limit = (state.read(x, np.uint32)[threads].astype(np.int64) for x in (offset, clamp))
        by &= 31
        segment = (limit >> 8) & 31
        first, last = lane & segment, (lane & segment) | ((limit & 31) & ~segment)
        if how == "up":
            origin = lane - by
            inside = origin >= last  # the clamp is a lower bound here
        elif how == "down":
            origin = lane + by
            inside = origin <= last
        elif how == "bfly":
            origin = lane ^ by
            inside = origin <= last
        else:
            origin = first | (by & ~segment)
            inside = origin <= last
        origin = np.where(inside, origin, lane)
        out = value.copy()
        out[threads] = np.take_along_axis(value[threads], origin, 1)
        state.write(target, out)

    return step


def _make_reduce(instruction: Instruction) -> Step:
    target, source, members = instruction.operands
    how, dtype = instruction.opcode[2], _type(instruction)
    combine = {"add": np.add, "min": np.minimum, "max": np.maximum}[how]

    def step(state: Threads) -> None:
        threads = state.whole_warps()
        if (state.read(members, np.uint32)[threads] != 0xFFFFFFFF).any():
            raise MachineError("a reduction over part of a warp")
        value = state.read(source, dtype)
        out = value.copy()
        out[threads] = combine.reduce(value[threads], 1, dtype=dtype, keepdims=True)
        state.write(target, out)

    return step


_INSTRUCTIONS: dict[str, Callable[[Instruction], Step]] = {
    "add": _elementwise(np.add, "rn", "ftz"),
    "sub": _elementwise(np.subtract, "rn", "ftz"),
    "mul": _make_multiply,
    "mad": _make_multiply_add,
    "fma": _elementwise(_fused, "rn", "ftz"),
    "div": _elementwise(_divide, "full", "rn", "ftz"),
    "rem": _elementwise(_remainder),
    "min": _extreme(np.minimum, np.fmin),
    "max": _extreme(np.maximum, np.fmax),
    "neg": _elementwise(np.negative, "ftz"),
    "abs": _elementwise(np.abs, "ftz"),
    "and": _elementwise(np.bitwise_and),
    "or": _elementwise(np.bitwise_or),
    "xor": _elementwise(np.bitwise_xor),
    "not": _elementwise(_not),
    "popc": _elementwise(_count_ones),
    "shl": _make_shift(_shift_left),
    "shr": _make_shift(_shift_right),
    "shf": _make_funnel,
    "bfe": _make_field,
    "prmt": _make_permute,
    "ex2": _elementwise(np.exp2, "approx", "ftz"),
    "lg2": _elementwise(np.log2, "approx", "ftz"),
    "rcp": _elementwise(np.reciprocal, "approx", "rn", "ftz"),
    "sqrt": _elementwise(np.sqrt, "approx", "rn", "ftz"),
    "rsqrt": _elementwise(lambda x: 1 / np.sqrt(x), "approx", "ftz"),
    "mov": _make_move,
    "setp": _make_compare,
    "selp": _make_select,
    "cvt": _make_convert,
    "ld": _make_load,
    "st": _make_store,
    "atom": _make_atomic,
    "cp": copy_asynchronously,
    "bar": _make_barrier,
    "shfl": _make_shuffle,
    "redux": _make_reduce,
    "ldmatrix": load_matrix,
    "stmatrix": store_matrix,
    "mma": multiply,
}
