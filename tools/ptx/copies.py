"""Asynchronous copies from global to shared memory. Their data arrives with the wait, not earlier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.ptx.memory import POISON, MachineError
from tools.ptx.program import Instruction

if TYPE_CHECKING:
    from tools.ptx.machine import Step, Threads

Array = NDArray[np.generic]


class _Copy(NamedTuple):
    threads: NDArray[np.int64]
    group: NDArray[np.int64]
    address: Array
    values: list[Array]


class Copies:
    """Copies that have started and not arrived. Each thread counts its own groups."""

    def __init__(self, threads: int) -> None:
        self._committed = np.zeros(threads, np.int64)
        self._pending: list[_Copy] = []

    def start(self, state: Threads, address: Array, values: list[Array]) -> None:
        threads = np.flatnonzero(state.mask)
        # Until the wait, the target holds neither the old data nor the new.
        _store(
            state, threads, address, [np.full_like(value, int.from_bytes([POISON] * 4, "little")) for value in values]
        )
        self._pending.append(_Copy(threads, self._committed[threads], address, values))

    def commit(self, mask: Array) -> None:
        self._committed[mask] += 1

    def wait(self, state: Threads, left: int) -> None:
        """Finish all groups of the participating threads, except the last ``left``."""
        pending = []
        for copy in self._pending:
            done = state.mask[copy.threads] & (copy.group < self._committed[copy.threads] - left)
            if done.any():
                _store(state, copy.threads[done], copy.address[done], [value[done] for value in copy.values])
            if not done.all():
                rest = ~done
                values = [value[rest] for value in copy.values]
                pending.append(_Copy(copy.threads[rest], copy.group[rest], copy.address[rest], values))
        self._pending = pending


def _store(state: Threads, threads: NDArray[np.int64], address: Array, values: list[Array]) -> None:
    state.shared.store(state.block[threads], state.warp[threads], address, values, 4)


def copy_asynchronously(instruction: Instruction) -> Step:
    what: tuple[Any, ...] = instruction.opcode[2:]
    if what == ("commit_group",):
        return lambda state: state.copies.commit(state.mask)
    if what == ("wait_group",):
        left = int(str(instruction.operands[0]))
        return lambda state: state.copies.wait(state, left)
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
        state.copies.start(state, state.address(into)[mask], values)

    return step
