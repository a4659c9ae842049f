"""Launch grids stay within the limits of CUDA for many images and for long ones."""

import pytest
import torch

from dcdit.kernels.launch import record_launches
from dcdit.ops import TokenSelection, _triton

MOST = (2**31 - 1, 65_535, 65_535)
"""Programs along each axis of a CUDA grid."""


def start_everything(images: int, grid: tuple[int, int], width: int) -> None:
    """Every operation, forward and backward, on tensors without memory."""
    length = grid[0] * grid[1]

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta", requires_grad=True)

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    p, mask = floats(images, length), torch.empty(images, length, dtype=torch.bool, device="meta")
    tokens = images * length // 4
    sel = TokenSelection(
        indices=ints(tokens).long(),
        cu_seqlens=ints(images + 1),
        lengths=ints(images),
        max_seqlen=length,
        mask=mask,
        natural_mask=mask,
        packed_rows=ints(images, length),
        overflow=ints(),
        source_cu_seqlens=None,
        prob_floor=0.5,
    )
    x, h, table = floats(images, length, width), floats(tokens, width), floats(images, width)
    affine = [floats(width) for _ in range(3)]
    _triton.select_tokens(p.detach(), None, 0.5, 0.2, None, tokens, length, mask)
    outputs = [
        _triton.boundary_prob_cosine(x, x, None),
        _triton.boundary_prob_cosine2d(x, x, floats(width, 3, 3), grid),
        _triton.boundary_prob_predictability(floats(images, width, *grid), *affine, floats(), 8, 1e-5),
        _triton.group_norm_silu(x, 32, *affine[:2], table, 1e-5),
        _triton.gather_tokens(x, sel, floats(length, width)),
        _triton.scatter_tokens(h, sel, 0.0),
        _triton.dechunk_spatial(h, p, sel, grid, 1.0, p, x),
        _triton.dechunk_ema(h, p, sel, p, x),
        *_triton.gated_add_modulated_layer_norm(h, h, table, table, table, sel.cu_seqlens, 1e-6),
        _triton.ratio_loss(p, mask, 4.0, 1),
    ]
    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


@pytest.mark.parametrize(("images", "grid"), [(200_000, (4, 4)), (1, (2048, 2048))], ids=["images", "positions"])
def test_grids_fit(images: int, grid: tuple[int, int]) -> None:
    with record_launches() as recorded:
        start_everything(images, grid, 64)
    assert len(recorded) > 30
    for launch in recorded:
        assert all(n <= most for n, most in zip(launch.grid, MOST, strict=False)), (launch.kernel, launch.grid)
