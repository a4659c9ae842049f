"""Kernels take the cosine of rows whose squares and products overflow float32."""

import pytest
import torch
from support import large_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", large_rows.SCALES)
@pytest.mark.parametrize("name", ["cosine", "packed", "cosine2d"])
def test_large_rows(name: str, scale: str, dtype: torch.dtype, device: torch.device) -> None:
    op, args = large_rows.arguments(name, large_rows.SCALES[scale], dtype, device)
    large_rows.check(op, args, "triton")
