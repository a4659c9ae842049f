"""What each PTX instruction does: the part of PTX ISA 8.7 that Triton emits for sm_80, sm_90 and sm_100."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tools.ptx.arithmetic import ARITHMETIC
from tools.ptx.machine import WARP, Step, Threads
from tools.ptx.matrix import load_matrix, multiply, store_matrix
from tools.ptx.memory import UNSIGNED, MachineError
from tools.ptx.operands import TYPES, check_qualifiers, reader, type_of, writer
from tools.ptx.program import Instruction

Array = NDArray[np.generic]
Operand = str | tuple[str, ...]

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_ROUNDING = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def translate(instruction: Instruction) -> Step | None:
    """A function that executes the instruction; None for branches and returns, which the machine handles.

    Raises:
        MachineError: an unknown instruction.
    """
    name = instruction.opcode[0]
    if name in ("bra", "ret", "exit"):
        return None
    make = _INSTRUCTIONS.get(name)
    if make is None:
        raise MachineError(f"unknown instruction: {instruction.text}")
    return make(instruction)


# --- moving, choosing, converting -------------------------------------------------------------------------------------


def _make_move(instruction: Instruction) -> Step:
    dtype, (target, source) = type_of(instruction), instruction.operands
    if isinstance(target, tuple):  # a register is cut into parts
        part = np.dtype(f"u{dtype.itemsize // len(target)}")

        def cut(state: Threads) -> None:
            parts = np.ascontiguousarray(state.read(source, dtype)).view(part).reshape(state.total, -1)
            for k, register in enumerate(target):
                state.write(register, parts[:, k].copy())

        return cut
    if isinstance(source, tuple):  # parts are joined
        part = np.dtype(f"u{dtype.itemsize // len(source)}")

        def join(state: Threads) -> None:
            # The compiler completes pairs with a register that is never written and never used.
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
    how, dtype, (target, a, b) = instruction.opcode[1], type_of(instruction), instruction.operands
    check_qualifiers(instruction, how, "ftz")

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
    dtype, (target, a, b, which) = type_of(instruction), instruction.operands

    def step(state: Threads) -> None:
        state.write(target, np.where(state.read(which, bool), state.read(a, dtype), state.read(b, dtype)))

    return step


def _make_convert(instruction: Instruction) -> Step:
    *_, into, of = instruction.opcode
    check_qualifiers(instruction, *_ROUNDING, "rn", "ftz", into)
    target, *sources = instruction.operands
    read, write = reader(of), writer(into)
    rounded = next((_ROUNDING[q] for q in instruction.opcode if q in _ROUNDING), None)

    def step(state: Threads) -> None:
        # The second operand of a pair fills the lower half.
        values = [read(state, source) for source in reversed(sources)]
        value = np.stack(values, 1).ravel()
        if rounded is not None:
            bounds = np.iinfo(TYPES[into])
            value = np.clip(rounded(np.nan_to_num(value.astype(np.float64))), float(bounds.min), float(bounds.max))
        write(state, target, value)

    return step


# --- memory -----------------------------------------------------------------------------------------------------------


def _vector(operand: Operand) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _make_load(instruction: Instruction) -> Step:
    space, (target, address) = instruction.opcode[1], instruction.operands
    if space == "param":
        dtype, name = type_of(instruction), str(address)[1:-1]

        def parameter(state: Threads) -> None:
            state.write(target, state.registers[name].astype(f"u{dtype.itemsize}").view(dtype))

        return parameter
    check_qualifiers(instruction, space, "v2", "v4", "relaxed", "gpu")
    size, registers = type_of(instruction).itemsize, _vector(target)

    def step(state: Threads) -> None:
        addresses, mask = state.address(str(address))[state.mask], state.mask
        if space == "global":
            values = state.memory.load(state.warp[mask], addresses, len(registers), size)
        else:
            values = state.shared.load(state.block[mask], state.warp[mask], addresses, len(registers), size)
        for register, value in zip(registers, values, strict=True):
            state.write_some(register, value)

    return step


def _make_store(instruction: Instruction) -> Step:
    space, (address, source) = instruction.opcode[1], instruction.operands
    check_qualifiers(instruction, space, "v2", "v4", "relaxed", "gpu")
    size, registers = type_of(instruction).itemsize, _vector(source)

    def step(state: Threads) -> None:
        addresses, mask = state.address(str(address))[state.mask], state.mask
        values = [np.ascontiguousarray(state.read(register, UNSIGNED[size])[mask]) for register in registers]
        if space == "global":
            state.memory.store(state.warp[mask], addresses, values, size)
        else:
            state.shared.store(state.block[mask], state.warp[mask], addresses, values, size)

    return step


def _make_atomic(instruction: Instruction) -> Step:
    """Atomics without a result: its register stays unwritten, and a read of it is an error."""
    how, dtype = instruction.opcode[-2], type_of(instruction)
    combine = {"min": np.minimum, "max": np.maximum, "add": np.add}[how]
    check_qualifiers(instruction, "global", "gpu", "relaxed", how)
    _, address, source = instruction.operands

    def step(state: Threads) -> None:
        value = np.ascontiguousarray(state.read(source, dtype)[state.mask])
        addresses = state.address(str(address))[state.mask]
        state.memory.update(state.warp[state.mask], addresses, value, combine, dtype)

    return step


def _make_copy(instruction: Instruction) -> Step:
    """``cp.async``: a copy from global to shared memory, the end of a group of them, or the wait for some groups."""
    what = instruction.opcode[2:]
    if what == ("commit_group",):
        return lambda state: state.copies.commit(state.mask)
    if what == ("wait_group",):
        left = int(str(instruction.operands[0]))
        return lambda state: state.copies.wait(state.mask, left)
    if what not in (("ca", "shared", "global"), ("cg", "shared", "global")):
        raise MachineError(f"unknown copy: {instruction.text}")
    into, source, size, *given = (str(operand) for operand in instruction.operands)
    words = int(size, 0) // 4

    def step(state: Threads) -> None:
        mask = state.mask
        # A copy fills with zeros what it does not read. Only all or nothing is supported here.
        read = state.read(given[0], np.uint32)[mask] if given else np.full(int(mask.sum()), 4 * words)
        if not np.isin(read, (0, 4 * words)).all():
            raise MachineError("unknown copy: it reads a part of its bytes")
        values = [np.zeros(len(read), np.uint32) for _ in range(words)]
        wanted = state.address(source)[mask][read > 0]
        for value, word in zip(values, state.memory.load(state.warp[mask][read > 0], wanted, words, 4), strict=True):
            value[read > 0] = word
        state.copies.start(mask, state.address(into)[mask], values)

    return step


# --- between threads --------------------------------------------------------------------------------------------------


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
        origin = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~segment)}[how]
        inside = origin >= last if how == "up" else origin <= last  # for "up" the clamp is a lower bound
        origin = np.where(inside, origin, lane)
        out = value.copy()
        out[threads] = np.take_along_axis(value[threads], origin, 1)
        state.write(target, out)

    return step


def _make_reduce(instruction: Instruction) -> Step:
    target, source, members = instruction.operands
    how, dtype = instruction.opcode[2], type_of(instruction)
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
    **ARITHMETIC,
    "mov": _make_move,
    "setp": _make_compare,
    "selp": _make_select,
    "cvt": _make_convert,
    "ld": _make_load,
    "st": _make_store,
    "atom": _make_atomic,
    "cp": _make_copy,
    "bar": _make_barrier,
    "shfl": _make_shuffle,
    "redux": _make_reduce,
    "ldmatrix": load_matrix,
    "stmatrix": store_matrix,
    "mma": multiply,
}
