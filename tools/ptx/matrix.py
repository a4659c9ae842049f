"""Tensor-core instructions: how the registers of a warp hold matrices."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx.machine import WARP, Step, Threads
from tools.ptx.memory import MachineError
from tools.ptx.number import HALVES
from tools.ptx.program import Instruction

_LANE = np.arange(WARP)
_ROW, _PAIR = _LANE // 4, 2 * (_LANE % 4)


def _access(instruction: Instruction, registers: Any, address: Any) -> tuple[tuple[str, ...], str, bool]:
    """One register for each matrix, the address operand, and whether matrices are transposed; checked."""
    *shape, space, kind = instruction.opcode[1:]
    known = shape[:2] == ["sync", "aligned"] and "m8n8" in shape and kind == "b16" and space.startswith("shared")
    if not known or f"x{len(registers)}" not in shape:
        raise MachineError(f"unknown matrix access: {instruction.text}")
    return registers, address, "trans" in shape


def _rows(state: Threads, address: str, threads: NDArray[np.int64], k: int) -> tuple[NDArray[np.generic], ...]:
    """Block, warp and address of the 8 rows of each warp's matrix ``k``: lane 8 k + r names row r."""
    owner = np.repeat(threads[:, 0], 8)
    start = state.address(address)[threads][:, 8 * k : 8 * k + 8].reshape(-1)
    return state.block[owner], state.warp[owner], start


def load_matrix(instruction: Instruction) -> Step:
    registers, address, transposed = _access(instruction, *instruction.operands)

    def step(state: Threads) -> None:
        threads = state.whole_warps()
        # All addresses before the first result, because a target register may hold the address.
        rows = [_rows(state, address, threads, k) for k in range(len(registers))]
        for register, row in zip(registers, rows, strict=True):
            halves = np.stack(state.shared.load(*row, 2, 8), 1).view(np.uint16)
            halves = halves.reshape(-1, 8, 8)
            if transposed:
                halves = halves.transpose(0, 2, 1)
            out = np.zeros(state.total, np.uint32)
            out[threads] = np.stack([halves[:, _ROW, _PAIR], halves[:, _ROW, _PAIR + 1]], 2).view(np.uint32)[..., 0]
            state.write(register, out)

    return step


def store_matrix(instruction: Instruction) -> Step:
    address, registers = instruction.operands
    registers, address, transposed = _access(instruction, registers, address)

    def step(state: Threads) -> None:
        threads = state.whole_warps()
        for k, register in enumerate(registers):
            pairs = np.ascontiguousarray(state.read(register, np.uint32)[threads]).view(np.uint16).reshape(-1, WARP, 2)
            halves = np.zeros((len(threads), 8, 8), np.uint16)
            halves[:, _ROW, _PAIR], halves[:, _ROW, _PAIR + 1] = pairs[..., 0], pairs[..., 1]
            if transposed:
                halves = np.ascontiguousarray(halves.transpose(0, 2, 1))
            parts = halves.reshape(-1, 8).view(np.uint64)
            state.shared.store(*_rows(state, address, threads, k), list(np.ascontiguousarray(parts.T)), 8)

    return step


def multiply(instruction: Instruction) -> Step:
    """``d = a b + c`` for m16n8k16 with 16-bit factors and float32 sums."""
    kind = instruction.opcode[-2]
    expected = ("sync", "aligned", "m16n8k16", "row", "col", "f32", kind, kind, "f32")
    if instruction.opcode[1:] != expected or kind not in HALVES:
        raise MachineError(f"unknown product: {instruction.text}")
    targets, a, b, c = instruction.operands
    assert all(isinstance(x, tuple) for x in (targets, a, b, c))

    def step(state: Threads) -> None:
        threads = state.whole_warps()

        def halves(register: str) -> NDArray[np.floating]:
            bits = np.ascontiguousarray(state.read(register, np.uint32)[threads]).view(np.uint16)
            return HALVES[kind][0](bits.reshape(-1, WARP, 2))

        left = np.zeros((len(threads), 16, 16))
        for register, row, col in zip(a, (0, 8, 0, 8), (0, 0, 8, 8), strict=True):
            pair = halves(register)
            for half in range(2):
                left[:, _ROW + row, _PAIR + col + half] = pair[..., half]
        right = np.zeros((len(threads), 16, 8))
        for register, row in zip(b, (0, 8), strict=True):
            pair = halves(register)
            for half in range(2):
                right[:, _PAIR + row + half, _ROW] = pair[..., half]
        positions = [(_ROW, _PAIR), (_ROW, _PAIR + 1), (_ROW + 8, _PAIR), (_ROW + 8, _PAIR + 1)]
        total = np.zeros((len(threads), 16, 8))
        for register, (row, col) in zip(c, positions, strict=True):
            total[:, row, col] = state.read(register, np.float32)[threads]
        total += left @ right
        results = []
        for row, col in positions:
            out = np.zeros(state.total, np.float32)
            out[threads] = total[:, row, col]
            results.append(out)
        # All results before the first write, because a target register may be a source.
        for register, out in zip(targets, results, strict=True):
            state.write(register, out)

    return step
