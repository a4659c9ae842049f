"""bfloat16 and float16 as the bits that a register holds."""

import numpy as np
from numpy.typing import NDArray


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bfloat16(value: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def to_half(value: NDArray[np.float32]) -> NDArray[np.uint16]:
    return value.astype(np.float16).view(np.uint16)


def from_half(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return bits.view(np.float16).astype(np.float32)


HALVES = {"bf16": (from_bfloat16, bfloat16), "f16": (from_half, to_half)}
"""How to read a type from its bits, and how to write it as bits."""
