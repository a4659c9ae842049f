"""Triton's interpreter cuts float32 off to bfloat16; here it rounds to nearest, as a GPU does."""

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

from tools.ptx.number import bfloat16


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every conversion until the monkeypatch is undone."""
    convert = interpreter._convert_float

    def rounded(value: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return bfloat16(value)
        return convert(value, source, target, rounding_mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
