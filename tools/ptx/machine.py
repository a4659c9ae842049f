"""Run PTX on a CPU: all threads of a few blocks together, one numpy operation for each instruction.

This tests compiled kernels without a GPU. Triton's interpreter runs the Triton language; this machine runs what the
compiler made of it for a target. Threads that diverge at a branch wait for each other: those at the lowest instruction
go first. Every address is checked against the tensors, and shared memory is checked for races between warps.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.ptx.copies import Copies
from tools.ptx.counts import Counts
from tools.ptx.memory import UNSIGNED, GlobalMemory, MachineError, SharedMemory
from tools.ptx.program import Program

Array = NDArray[np.generic]
WARP = 32
THREADS_AT_ONCE = 8192
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]")
_WIDTHS = {1: np.dtype(bool), 16: np.dtype(np.uint16), 32: np.dtype(np.uint32), 64: np.dtype(np.uint64)}


class Threads:
    """Registers and positions of all threads of several blocks."""

    def __init__(
        self, program: Program, blocks: Array, grid: tuple[int, ...], size: int, shared: int, memory: GlobalMemory,
        counts: Counts | None,
    ) -> None:  # fmt: skip
        """``blocks`` (n, 3) indices of blocks in a grid; ``size`` threads in each."""
        self.program = program
        self.memory = memory
        self.shared = SharedMemory(len(blocks), shared, counts)
        self.counts = counts
        self.total = len(blocks) * size
        thread = np.arange(self.total)
        self.block, self.warp = thread // size, thread // WARP
        self.registers: dict[str, Array] = {"%tid.x": (thread % size).astype(np.uint32)}
        for axis, name in enumerate("xyz"):
            self.registers[f"%ctaid.{name}"] = blocks[self.block, axis].astype(np.uint32)
            self.registers[f"%nctaid.{name}"] = np.full(self.total, grid[axis], np.uint32)
        self.copies = Copies(self.shared, self.block, self.warp)
        self.groups: dict[int, Array] = {0: np.ones(self.total, dtype=bool)}
        """Position to the threads that are there."""
        self.running = np.ones(self.total, dtype=bool)
        self.mask = self.running
        """The threads that execute the current instruction."""

    def width(self, register: str) -> np.dtype[Any]:
        prefix = register.rstrip("0123456789")
        return _WIDTHS[self.program.registers[prefix]]

    def read(self, operand: str, dtype: Any) -> Array:
        """An operand of all threads as ``dtype``: reinterpreted if the sizes agree, else cut or extended with zeros."""
        dtype = np.dtype(dtype)
        if operand.startswith("%"):
            value = self.registers.get(operand)
            if value is None:
                raise MachineError(f"{operand} is read before it is written")
            if value.dtype.itemsize != dtype.itemsize:
                value = value.astype(UNSIGNED[dtype.itemsize])
            return value.view(dtype)
        return np.broadcast_to(_immediate(operand, dtype), self.total)

    def write(self, register: str, value: Array) -> None:
        """Write a result for the threads in ``mask``."""
        if register == "_":
            return
        dtype = self.width(register)
        if value.dtype != dtype:
            if value.dtype.itemsize == dtype.itemsize:
                value = np.ascontiguousarray(value).view(dtype)
            else:
                # Signed values are extended with their sign.
                value = value.astype(np.dtype(f"i{dtype.itemsize}") if value.dtype.kind == "i" else dtype).view(dtype)
        before = self.registers.get(register)
        # Threads outside of the mask have not written this register, so they do not read it: any value is right.
        self.registers[register] = value if before is None or self.mask.all() else np.where(self.mask, value, before)

    def write_some(self, register: str, values: Array) -> None:
        """Write a result that holds the values of the threads in ``mask`` only, one after the other."""
        spread = np.zeros(self.total, values.dtype)
        spread[self.mask] = values
        self.write(register, spread)

    def address(self, operand: str) -> Array:
        """Byte addresses of all threads from ``[register + offset]``."""
        match = _ADDRESS.fullmatch(operand)
        if match is None:
            raise MachineError(f"unknown address {operand}")
        offset = np.uint64(int(match[2] or 0) % 2**64)
        if match[1] == "global_smem":
            return np.full(self.total, offset)
        return self.read(match[1], self.width(match[1])).astype(np.uint64) + offset

    def whole_warps(self) -> Array:
        """Indices (warps, 32) of the threads in ``mask``, which must be whole warps."""
        by_warp = self.mask.reshape(-1, WARP)
        some = by_warp.any(1)
        if not by_warp[some].all():
            raise MachineError("an instruction for whole warps meets a warp whose threads have diverged")
        return np.arange(self.total).reshape(-1, WARP)[some]

    def barrier(self) -> None:
        """A barrier for the blocks in ``mask``, which all their running threads must reach together."""
        arrived = np.unique(self.block[self.mask])
        missing = self.running & ~self.mask
        if missing.any() and np.isin(self.block[missing], arrived).any():
            raise MachineError("a barrier is not reached by all threads of its block")
        self.shared.barrier(arrived)


Step = Callable[[Threads], None]


def run(
    program: Program,
    steps: list[Step | None],
    grid: tuple[int, ...],
    threads: int,
    shared: int,
    parameters: dict[str, int],
    memory: GlobalMemory,
    counts: Counts | None = None,
) -> None:
    """Run all blocks of a grid. ``steps`` are the translated instructions; None where threads branch or end."""
    sizes = tuple(grid) + (1,) * (3 - len(grid))
    every = np.stack(np.unravel_index(np.arange(int(np.prod(sizes))), sizes[::-1])[::-1], 1)
    at_once = max(1, THREADS_AT_ONCE // threads)
    with np.errstate(all="ignore"):
        for start in range(0, len(every), at_once):
            state = Threads(program, every[start : start + at_once], sizes, threads, shared, memory, counts)
            for name, value in parameters.items():
                state.registers[name] = np.full(state.total, value, np.uint64)
            _run_blocks(state, steps)


def _run_blocks(state: Threads, steps: list[Step | None]) -> None:
    instructions, groups = state.program.instructions, state.groups
    while groups:
        position = min(groups)
        group = groups.pop(position)
        waiting = min(groups, default=len(instructions) + 1)
        while position < waiting:
            instruction, step = instructions[position], steps[position]
            mask = group
            if instruction.guard is not None:
                guard = state.read(instruction.guard, bool)
                mask = group & (~guard if instruction.negated else guard)
            if step is None:
                if instruction.opcode[0] == "bra":
                    _join(groups, state.program.labels[str(instruction.operands[0])], mask)
                else:
                    state.running &= ~mask
                group = group & ~mask
                waiting = min(groups, default=len(instructions) + 1)
                if not group.any():
                    break
            elif mask.any():
                state.mask = mask
                if state.counts is not None:
                    state.counts.instruction(mask)
                try:
                    step(state)
                except MachineError as error:
                    raise MachineError(f"{state.program.name}, {instruction.text}: {error}") from error
            position += 1
        else:
            _join(groups, position, group)


def _join(groups: dict[int, Array], position: int, mask: Array) -> None:
    if mask.any():
        groups[position] = groups[position] | mask if position in groups else mask


def _immediate(operand: str, dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "b":
        return np.array(int(operand, 0) != 0)
    value = int(operand[2:], 16) if operand.startswith("0f") else int(operand.rstrip("U"), 0)
    return np.array(value & ((1 << 8 * dtype.itemsize) - 1), UNSIGNED[dtype.itemsize]).view(dtype)
