"""The two memories of a launch, with checks: global memory (the tensors) and the shared memory of each block."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.ptx.counts import Counts

Array = NDArray[np.generic]
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
POISON = 0xFF
"""Every byte of shared memory before it is written: NaN in every float type."""
_SEVERAL = -2
"""Instead of the number of a warp: several warps."""


class MachineError(Exception):
    """A program does something that is undefined on a GPU, or unknown to this machine."""


class _Range(NamedTuple):
    start: int
    stop: int
    bytes: NDArray[np.uint8]


class GlobalMemory:
    """The tensors of a launch, at their own addresses. Any other address is an error."""

    def __init__(self, tensors: list[Tensor], counts: Counts | None = None) -> None:
        self._counts = counts
        self._ranges: list[_Range] = []
        for tensor in tensors:
            if tensor.numel():
                start, stop = span(tensor)
                flat = torch.empty(0, dtype=torch.uint8).set_(
                    tensor.untyped_storage(), tensor.storage_offset() * tensor.element_size(), (stop - start,), (1,)
                )
                self._ranges.append(_Range(start, stop, flat.numpy()))

    def _locate(self, address: Array, size: int) -> list[tuple[_Range, Array, Array]]:
        """(range, mask of the lanes in it, their byte offsets) of every range that the addresses lie in."""
        if (address % np.uint64(size)).any():
            raise MachineError(f"an access of {size} bytes is not aligned")
        left, found = np.ones(address.shape, dtype=bool), []
        for given in self._ranges:
            mine = left & (address >= np.uint64(given.start)) & (address + np.uint64(size) <= np.uint64(given.stop))
            if mine.any():
                found.append((given, mine, (address[mine] - np.uint64(given.start)).astype(np.int64)))
                left &= ~mine
                if not left.any():
                    return found
        raise MachineError(f"{int(left.sum())} accesses of {size} bytes lie outside of every argument")

    def load(self, warp: Array, address: Array, count: int, size: int) -> list[Array]:
        """``count`` neighbouring elements of ``size`` bytes at each address."""
        if self._counts is not None:
            self._counts.read(warp, address, count * size)
        out = [np.empty(address.shape, UNSIGNED[size]) for _ in range(count)]
        for given, mine, offset in self._locate(address, count * size) if address.size else []:
            for k in range(count):
                out[k][mine] = _gather(given.bytes, offset + k * size, size)
        return out

    def store(self, warp: Array, address: Array, values: list[Array], size: int) -> None:
        if self._counts is not None:
            self._counts.written(warp, address, len(values) * size)
        for given, mine, offset in self._locate(address, len(values) * size) if address.size else []:
            for k, value in enumerate(values):
                _scatter(given.bytes, offset + k * size, value[mine], size)

    def update(self, warp: Array, address: Array, value: Array, combine: np.ufunc, dtype: np.dtype) -> None:
        """An atomic without its result. Lanes act one after the other."""
        size = dtype.itemsize
        if self._counts is not None:
            self._counts.written(warp, address, size)
        for given, mine, offset in self._locate(address, size) if address.size else []:
            view = given.bytes[: given.bytes.size // size * size].view(dtype)
            combine.at(view, offset // size, value[mine].view(dtype))


class SharedMemory:
    """Shared memory of several blocks, with a record of the warps that accessed each byte since the last barrier."""

    def __init__(self, blocks: int, size: int, counts: Counts | None = None) -> None:
        self._counts = counts
        self.size = max(size, 1)
        self._bytes = np.full(blocks * self.size, POISON, np.uint8)
        self._epoch = np.zeros(blocks, np.int64)
        self._writer, self._reader = (np.full((2, blocks * self.size), -1, np.int64) for _ in range(2))

    def barrier(self, blocks: Array) -> None:
        self._epoch[blocks] += 1

    def _access(
        self, block: Array, warp: Array, address: Array, count: int, size: int
    ) -> tuple[Array, Array, Array, Array]:
        """Positions (n,) of the accesses and (n, bytes) of all their bytes, and epoch and warp of each (n, 1)."""
        address, width = address.astype(np.int64), count * size
        if (address % width).any():
            raise MachineError(f"a shared access of {width} bytes is not aligned")
        if (address + width > self.size).any() or (address < 0).any():
            raise MachineError(f"a shared access leaves the {self.size} bytes of its block")
        if self._counts is not None:
            self._counts.shared(warp, address, width)
        position = block * self.size + address
        return position, position[:, None] + np.arange(width), self._epoch[block][:, None], warp[:, None]

    def load(self, block: Array, warp: Array, address: Array, count: int, size: int) -> list[Array]:
        position, every, epoch, warp = self._access(block, warp, address, count, size)
        if ((self._writer[0][every] == epoch) & (self._writer[1][every] != warp)).any():
            raise MachineError("race: shared memory is read before a barrier follows another warp's write")
        reader = np.where((self._reader[0][every] == epoch) & (self._reader[1][every] != warp), _SEVERAL, warp)
        self._reader[0][every], self._reader[1][every] = epoch, reader
        # Other warps may have read the same byte in this step.
        self._reader[1][every] = np.where(self._reader[1][every] == reader, reader, _SEVERAL)
        return [_gather(self._bytes, position + k * size, size) for k in range(count)]

    def store(self, block: Array, warp: Array, address: Array, values: list[Array], size: int) -> None:
        position, every, epoch, warp = self._access(block, warp, address, len(values), size)
        if ((self._reader[0][every] == epoch) & (self._reader[1][every] != warp)).any():
            raise MachineError("race: shared memory is written before a barrier follows another warp's read")
        written = (self._writer[0][every] == epoch) & (self._writer[1][every] != warp)
        new = np.stack([value.view(np.uint8).reshape(-1, size) for value in values], 1).reshape(len(position), -1)
        # Several threads may store copies of one value.
        if (written & (self._bytes[every] != new)).any():
            raise MachineError("race: two warps write different values to shared memory without a barrier between")
        self._bytes[every] = new
        lost = (self._bytes[every] != new).any(1)
        if lost.any():
            # Within a warp, lanes may store different values and one of them wins: copies of a sum can differ in the
            # last bit, because each lane fuses its own product into it. But all warps must store the same value.
            _, last = np.unique(np.stack([position, warp[:, 0]], 1)[::-1], axis=0, return_index=True)
            winners = len(position) - 1 - last
            if (self._bytes[every[winners]] != new[winners]).any():
                raise MachineError("race: two warps write different values to shared memory in one step")
        self._writer[0][every], self._writer[1][every] = epoch, warp


def _gather(memory: NDArray[np.uint8], offset: Array, size: int) -> Array:
    if size == 1:
        return memory[offset]
    return memory[offset[:, None] + np.arange(size)].view(UNSIGNED[size])[:, 0]


def _scatter(memory: NDArray[np.uint8], offset: Array, value: Array, size: int) -> None:
    memory[offset[:, None] + np.arange(size)] = np.ascontiguousarray(value).view(np.uint8).reshape(-1, size)


def span(tensor: Tensor) -> tuple[int, int]:
    """First byte and past-last byte of a tensor."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
