"""Asynchronous copies from global to shared memory. Their data arrives with the wait, not earlier."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.ptx.memory import POISON, SharedMemory

Array = NDArray[np.generic]


class _Copy(NamedTuple):
    threads: NDArray[np.int64]
    group: NDArray[np.int64]
    address: Array
    values: list[Array]


class Copies:
    """Copies that have started and not arrived. Each thread counts its own groups.

    Args:
        shared: the memory that they go to.
        block, warp: of each thread.
    """

    def __init__(self, shared: SharedMemory, block: Array, warp: Array) -> None:
        self._shared, self._block, self._warp = shared, block, warp
        self._committed = np.zeros(len(block), np.int64)
        self._pending: list[_Copy] = []

    def start(self, mask: Array, address: Array, values: list[Array]) -> None:
        """Each thread in ``mask`` copies its values to its address."""
        threads = np.flatnonzero(mask)
        # Until the wait, the target holds neither the old data nor the new.
        poison = int.from_bytes([POISON] * 4, "little")
        self._store(threads, address, [np.full_like(value, poison) for value in values])
        self._pending.append(_Copy(threads, self._committed[threads], address, values))

    def commit(self, mask: Array) -> None:
        """What the threads in ``mask`` have started since their last commit is a group."""
        self._committed[mask] += 1

    def wait(self, mask: Array, left: int) -> None:
        """Finish all groups of the threads in ``mask``, except the last ``left``."""
        pending = []
        for copy in self._pending:
            done = mask[copy.threads] & (copy.group < self._committed[copy.threads] - left)
            if done.any():
                self._store(copy.threads[done], copy.address[done], [value[done] for value in copy.values])
            if not done.all():
                rest = ~done
                values = [value[rest] for value in copy.values]
                pending.append(_Copy(copy.threads[rest], copy.group[rest], copy.address[rest], values))
        self._pending = pending

    def _store(self, threads: NDArray[np.int64], address: Array, values: list[Array]) -> None:
        self._shared.store(self._block[threads], self._warp[threads], address, values, 4)
