"""Counts of what a launch does: instructions of warps, sectors of global memory, passes through shared memory."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
SECTOR = 32
"""Bytes that global memory moves together."""
BANKS = 32
WARP = 32


class Counts:
    """Sums over all warps of a launch."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.instructions = 0
        """Executed by warps."""
        self.requested = 0
        """Bytes of global memory that lanes read or write. If several lanes of a warp access a byte in one instruction,
        it counts once."""
        self.sectors = 0
        """Sectors that each instruction of each warp touches, added up: what the caches must deliver."""
        self.passes = 0
        """Through the banks of shared memory."""
        self.least_passes = 0
        """The same, without bank conflicts."""
        self._touched: tuple[list[Array], list[Array]] = ([], [])

    def instruction(self, mask: Array) -> None:
        self.instructions += int(mask.reshape(-1, WARP).any(1).sum())

    def read(self, warp: Array, address: Array, size: int) -> None:
        self._access(warp, address, size, self._touched[0])

    def written(self, warp: Array, address: Array, size: int) -> None:
        self._access(warp, address, size, self._touched[1])

    def _access(self, warp: Array, address: Array, size: int, touched: list[Array]) -> None:
        distinct = np.unique(np.stack([warp.astype(np.uint64), address], 1), axis=0)
        self.requested += size * len(distinct)
        sector = distinct[:, 1] // np.uint64(SECTOR)  # an access is aligned to its size, at most 16 bytes
        self.sectors += len(np.unique(np.stack([distinct[:, 0], sector], 1), axis=0))
        touched.append(np.unique(sector))

    def shared(self, warp: Array, address: Array, size: int) -> None:
        # Accesses of 8 or 16 bytes are split into phases of half or a quarter of a warp, of at most 128 bytes each.
        lanes = max(1, 128 // max(size, 4))
        order = np.arange(len(warp)) - np.searchsorted(warp, warp)
        phase = warp.astype(np.int64) * WARP + order // lanes
        words = max(1, size // 4)
        word = (address.astype(np.int64)[:, None] // 4 + np.arange(words)).ravel()
        distinct = np.unique(np.stack([np.repeat(phase, words), word % BANKS, word], 1), axis=0)
        _, per_bank = np.unique(distinct[:, :2], axis=0, return_counts=True)
        phases = np.unique(distinct[:, :2], axis=0)[:, 0]
        starts = np.flatnonzero(np.r_[True, phases[1:] != phases[:-1]])
        self.passes += int(np.maximum.reduceat(per_bank, starts).sum())
        self.least_passes += len(starts)

    @property
    def moved(self) -> int:
        """Bytes of the distinct sectors read and of those written: the least that memory must move."""
        return SECTOR * sum(len(np.unique(np.concatenate(part))) if part else 0 for part in self._touched)
