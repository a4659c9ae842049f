"""Batches without an image, and images without a position: no kernel touches anything outside of its tensors."""

import pytest
import torch
from support.accuracy import check_against_reference
from support.inputs import packed_selection, randn, random_cu_seqlens
from torch import Tensor

from dcdit import ops
from dcdit.ops import reference

SHAPES = [(2, (0, 3)), (1, (2, 0)), (0, (2, 3)), (0, (0, 0))]


@pytest.mark.parametrize("capacity", [None, 5])
@pytest.mark.parametrize(("images", "grid"), SHAPES, ids=str)
def test_grids(images: int, grid: tuple[int, int], capacity: int | None, device: torch.device) -> None:
    length = grid[0] * grid[1]
    p, x = torch.zeros(images, length), randn(images, length, 8)
    with ops.use_backend("triton"):
        sel = ops.select_tokens(p.to(device), capacity=capacity)
    sel = sel._replace(indices=torch.full_like(sel.indices, -1))
    h, table, weight = randn(sel.indices.shape[0], 8), randn(images, 8), randn(8, 3, 3)
    parameters = [randn(8, seed=seed) for seed in range(3)]

    def check(op, *args) -> None:  # type: ignore[no-untyped-def]
        check_against_reference(op, *(a.to(device) if isinstance(a, Tensor) else a for a in args), backend="triton")

    on_device = type(sel)(*(a.to(device) if isinstance(a, Tensor) else a for a in sel))
    check(ops.dechunk_ema, h, p, on_device, p.clone(), x)
    check(ops.dechunk_spatial, h, p, on_device, grid, 1.0, p.clone(), x)
    check(ops.gather_tokens, x, on_device, randn(length, 8))
    check(ops.scatter_tokens, h, on_device, 1.0)
    check(ops.boundary_prob_cosine, x, x.clone())
    check(ops.boundary_prob_cosine2d, x, x.clone(), weight, grid)
    check(ops.boundary_prob_predictability, randn(images, 8, *grid), *parameters, randn(), 4)
    check(ops.group_norm_silu, x, 4, *parameters[:2], table)
    check(ops.gated_add_modulated_layer_norm, h, h.clone(), table, table, table, sel.cu_seqlens)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (0, 3, 0)], ids=str)
def test_packed_sequences(lengths: tuple[int, ...], device: torch.device) -> None:
    p, _ = packed_selection(*lengths)
    cu_seqlens = random_cu_seqlens(*lengths).to(device)
    sel = reference.select_tokens(p.to(device), cu_seqlens)
    rows = randn(sum(lengths), 8).to(device)
    args = randn(sel.indices.shape[0], 8).to(device), p.to(device), sel, p.to(device), rows
    check_against_reference(ops.dechunk_ema, *args, backend="triton")
    check_against_reference(ops.boundary_prob_cosine, rows, rows.clone(), cu_seqlens, backend="triton")
