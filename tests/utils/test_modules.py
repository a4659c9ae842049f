import pytest
import torch
from torch import nn

from dcdit.utils.modules import dtype_of


class Quantized(nn.Module):
    """Numbers that only store a weight come first, as in quantised layers and in layers kept in 8-bit floats."""

    def __init__(self, stored: torch.dtype, scale: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2).to(stored), requires_grad=False)
        if scale is not None:
            self.scale = nn.Parameter(torch.ones(2, dtype=scale))


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (nn.Linear(2, 2).bfloat16(), torch.bfloat16),
        (nn.Sequential(nn.SiLU(), nn.Linear(2, 2)).double(), torch.float64),
        (Quantized(torch.uint8, torch.float16), torch.float16),
        (Quantized(torch.float8_e4m3fn, torch.bfloat16), torch.bfloat16),
        (Quantized(torch.int8), torch.float32),
        (nn.SiLU(), torch.float32),
        (lambda x: x, torch.float32),
    ],
)
def test_dtype_in_which_a_model_computes(model, dtype):
    assert dtype_of(model) == dtype
