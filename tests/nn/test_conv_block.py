import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcdit.nn import ConvBlock, ConvStack, GroupNormSiLU, RMSNorm
from dcdit.nn.memory_format import channels_last, to_grid, to_tokens

COND = 16


def plain_block(block: ConvBlock, x: Tensor, cond: Tensor) -> Tensor:
    """The block as the paper draws it, every step on its own."""
    h = F.silu(F.group_norm(x, 32, block.norm1.weight, block.norm1.bias))
    h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
    h = h + F.linear(cond, block.cond_proj.weight, block.cond_proj.bias)[:, :, None, None]
    h = F.silu(F.group_norm(h, 32, block.norm2.weight, block.norm2.bias))
    h = F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
    skip = x if block.skip is None else F.conv2d(x, block.skip.weight[:, :, None, None], block.skip.bias)
    return h + skip


@pytest.mark.parametrize("widths", [(64, 64), (64, 128), (128, 64)])
def test_block_is_the_plain_sequence(widths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = ConvBlock(*widths, COND).double()
    x, cond = torch.randn(2, widths[0], 5, 7).double(), torch.randn(2, COND).double()
    torch.testing.assert_close(block(x, cond), plain_block(block, x, cond))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grid_and_tokens_share_memory_all_the_way(dtype: torch.dtype) -> None:
    """The encoder's output is (B, L, D) for free: no hidden copy between grid and tokens."""
    stack = channels_last(ConvStack((32, 32, 128), COND)).to(dtype)
    tokens = torch.randn(2, 5 * 7, 32, dtype=dtype)
    x = to_grid(tokens, (5, 7))
    assert x.data_ptr() == tokens.data_ptr()
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert to_tokens(x).data_ptr() == tokens.data_ptr()
    for block in stack.blocks:
        x = block(x, torch.randn(2, COND, dtype=dtype))
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert to_tokens(x).data_ptr() == x.data_ptr()
        assert to_tokens(x).is_contiguous()
    assert stack(tokens, (5, 7), torch.randn(2, COND, dtype=dtype)).is_contiguous()


def test_norms_keep_the_dtype_under_autocast() -> None:
    x = torch.randn(2, 64, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = GroupNormSiLU(32, 64)(x)
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert RMSNorm(64)(to_tokens(x)).dtype == torch.bfloat16


def test_rms_norm() -> None:
    norm = RMSNorm(8).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8).double()
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
