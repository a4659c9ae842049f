"""Triton's interpreter scans element by element in Python; here whole tiles are combined, in a tree as on a GPU."""

from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter


def _scan(self: Any, inputs: list[Any]) -> list[Any]:
    """Replaces ``ScanOps.generic_scan``; position i has combined its 2^k last elements after k steps."""
    out = [np.moveaxis(value.handle.data, self.axis, 0) for value in inputs]
    step = 1
    while step < out[0].shape[0]:
        before = [np.concatenate([data[:step], data[:-step]]) for data in out]
        operands = [
            self.to_tensor(data, value.dtype)
            for pair in (before, out)
            for data, value in zip(pair, inputs, strict=True)
        ]
        combined = self.combine_fn.fn(*operands)
        combined = combined if isinstance(combined, tuple) else (combined,)
        out = [
            np.concatenate([data[:step], result.handle.data[step:]]) for data, result in zip(out, combined, strict=True)
        ]
        step *= 2
    return [
        self.to_tensor(np.moveaxis(data, 0, self.axis), value.dtype) for data, value in zip(out, inputs, strict=True)
    ]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every scan until the monkeypatch is undone."""
    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", _scan)
