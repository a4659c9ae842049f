"""Outputs are filled with a value that shows where no kernel wrote."""

import pytest
import torch

from dcdit.kernels import launch


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    value = float("nan") if dtype.is_floating_point else True if dtype == torch.bool else torch.iinfo(dtype).min + 7
    return torch.full(shape, value, dtype=dtype, device=device)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every launch until the monkeypatch is undone."""
    monkeypatch.setattr(launch, "empty", _poisoned)
    monkeypatch.setattr(launch, "empty_like", lambda rows, dtype: _poisoned(tuple(rows.shape), dtype, rows.device))
