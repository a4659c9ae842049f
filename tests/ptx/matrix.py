"""Tensor-core instructions: how the fragments of a warp make up matrices."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from ptx.machine import WARP, Step, Threads
from ptx.memory import MachineError
from ptx.number import from_bfloat16, from_half
from ptx.program import Instruction

_LANE = np.arange(WARP)
_ROW, _PAIR = _LANE // 4, 2 * (_LANE % 4)


def _addresses(state: Threads, operand: str, threads: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """(warps, count, 8): where the rows of a warp's matrices start; lane 8 m + r names row r of matrix m."""
    return state.address(operand)[threads].astype(np.int64)[:, : 8 * count].reshape(-1, count, 8)


def _count(instruction: Instruction) -> tuple[int, bool]:
    *shape, space, kind = instruction.opcode[1:]
    if shape[:2] != ["sync", "aligned"] or "m8n8" not in shape or kind != "b16" or not space.startswith("shared"):
        raise MachineError(f"unknown matrix access: {instruction.text}")
    return next(int(part[1]) for part in shape if part in ("x1", "x2", "x4")), "trans" in shape


def load_matrix(instruction: Instruction) -> Step:
    count, transposed = _count(instruction)
    registers, address = instruction.operands
    assert isinstance(registers, tuple)

    def step(state: Threads) -> None:
        threads = state.whole_warps()
        start = _addresses(state, str(address), threads, count)
        for k, register in enumerate(registers):
            rows = _rows(state, threads, start[:, k])
            halves = rows.view(np.uint16)  # (warps, 8, 8)
            if transposed:
                halves = np.ascontiguousarray(halves.transpose(0, 2, 1))
            out = np.zeros(state.total, np.uint32)
            out[threads] = np.stack([halves[:, _ROW, _PAIR], halves[:, _ROW, _PAIR + 1]], 2).view(np.uint32)[..., 0]
            state.write(register, out)

    return step


def _rows(state: Threads, threads: NDArray[np.int64], start: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(warps, 8, 2) of 8 bytes: the 16 bytes at each of 8 addresses per warp."""
    owner = np.repeat(threads[:, 0], 8)
    parts = state.shared.load(state.block[owner], state.warp[owner], start.reshape(-1), 2, 8)
    return np.stack(parts, 1).reshape(-1, 8, 2)


def store_matrix(instruction: Instruction) -> Step:
    count, transposed = _count(instruction)
    address, registers = instruction.operands
    assert isinstance(registers, tuple)

    def step(state: Threads) -> None:
        threads = state.whole_warps()
        start, owner = _addresses(state, str(address), threads, count), np.repeat(threads[:, 0], 8)
        for k, register in enumerate(registers):
            pairs = np.ascontiguousarray(state.read(register, np.uint32)[threads]).view(np.uint16).reshape(-1, WARP, 2)
            halves = np.zeros((len(threads), 8, 8), np.uint16)
            halves[:, _ROW, _PAIR], halves[:, _ROW, _PAIR + 1] = pairs[..., 0], pairs[..., 1]
            if transposed:
                halves = np.ascontiguousarray(halves.transpose(0, 2, 1))
            parts = halves.reshape(-1, 8).view(np.uint64)
            values = [np.ascontiguousarray(parts[:, 0]), np.ascontiguousarray(parts[:, 1])]
            state.shared.store(state.block[owner], state.warp[owner], start[:, k].reshape(-1), values, 8)

    return step


_DECODE: dict[str, Callable[[NDArray[np.uint16]], NDArray[np.floating]]] = {
    "bf16": from_bfloat16,
    "f16": from_half,
}


def multiply(instruction: Instruction) -> Step:
    """``d = a b + c`` for m16n8k16 with 16-bit factors and float32 sums."""
    kind = instruction.opcode[-2]
    expected = ("sync", "aligned", "m16n8k16", "row", "col", "f32", kind, kind, "f32")
    if instruction.opcode[1:] != expected or kind not in _DECODE:
        raise MachineError(f"unknown product: {instruction.text}")
    targets, a, b, c = instruction.operands
    assert all(isinstance(x, tuple) for x in (targets, a, b, c))

    def step(state: Threads) -> None:
        threads = state.whole_warps()

        def halves(register: str) -> NDArray[np.floating]:
            bits = np.ascontiguousarray(state.read(register, np.uint32)[threads]).view(np.uint16)
            return _DECODE[kind](bits.reshape(-1, WARP, 2))

        left = np.zeros((len(threads), 16, 16))
        for register, row, col in zip(a, (0, 8, 0, 8), (0, 0, 8, 8), strict=True):
            for half in range(2):
                left[:, _ROW + row, _PAIR + col + half] = halves(register)[..., half]
        right = np.zeros((len(threads), 16, 8))
        for register, row in zip(b, (0, 8), strict=True):
            for half in range(2):
                right[:, _PAIR + row + half, _ROW] = halves(register)[..., half]
        places = [(_ROW, _PAIR), (_ROW, _PAIR + 1), (_ROW + 8, _PAIR), (_ROW + 8, _PAIR + 1)]
        total = np.zeros((len(threads), 16, 8))
        for register, (row, col) in zip(c, places, strict=True):
            total[:, row, col] = state.read(register, np.float32)[threads]
        total += left @ right
        results = []
        for row, col in places:
            out = np.zeros(state.total, np.float32)
            out[threads] = total[:, row, col]
            results.append(out)
        # Together: a target may be a source.
        for register, out in zip(targets, results, strict=True):
            state.write(register, out)

    return step
