import pytest
import torch
from torch import nn

from dcdit import ops
from dcdit.nn import ChunkLayer, ContextChunkLayer, EMADeChunk, SpatialDeChunk

GRID = (4, 6)
DIM = 8


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 24, DIM, generator=rng).to(dtype) for _ in range(2))
    return x, torch.rand(2, 24, generator=rng), residual


def dechunks() -> list[nn.Module]:
    return [SpatialDeChunk(GRID, 1.0), EMADeChunk()]


def test_chunk_keeps_the_selected_tokens_and_adds_their_position() -> None:
    x, p, _ = inputs()
    position = torch.randn(24, DIM)
    tokens, sel = ChunkLayer()(x, p, position)
    assert torch.equal(tokens, (x + position)[p > 0.5])
    tokens, sel = ChunkLayer()(x, p, budget=5)
    assert sel.lengths.tolist() == [5, 5]
    assert torch.equal(tokens, x[sel.mask])


def test_a_kept_token_reads_the_mean_of_its_cell() -> None:
    grid = (6, 9)  # 2 x 3 cells, the last ones smaller
    x, p = torch.randn(2, 54, DIM, dtype=torch.float64), torch.rand(2, 54)
    position = torch.randn(54, DIM, dtype=torch.float64)
    chunk = ContextChunkLayer(DIM, grid).double()
    tokens, _ = chunk(x, p, position, capacity=100)
    kept = (p > 0.5).unflatten(1, grid).nonzero().tolist()
    image = x.unflatten(1, grid)
    for row, (b, r, c) in zip(tokens, kept, strict=False):
        top, left = r // 4 * 4, c // 4 * 4
        mean = image[b, top : top + 4, left : left + 4].flatten(0, 1).mean(0)
        torch.testing.assert_close(row, image[b, r, c] + position.unflatten(0, grid)[r, c] + chunk.proj.weight @ mean)
    assert 30 < len(kept) < 100 and not tokens[len(kept) :].any()  # padding rows are zero


@pytest.mark.parametrize("dechunk", dechunks(), ids=["spatial", "ema"])
def test_gate_of_the_dechunk(dechunk: nn.Module) -> None:
    """d loss / d c is <g, dechunked>, and dc/dp is 1 above one half and -1 elsewhere (0.5 included)."""
    x, p, residual = inputs()
    p[:, 3] = 0.5
    tokens, sel = ChunkLayer()(x, p)
    weights = torch.randn(2, 24, DIM)
    bare = dechunk(tokens, p, sel, torch.zeros_like(residual))
    with_gate = p.clone().requires_grad_()
    out = dechunk(tokens, with_gate, sel, residual)
    torch.testing.assert_close(out, bare + residual)
    (out * weights).sum().backward()
    detached = p.clone().requires_grad_()
    args = (tokens, detached, sel)
    if isinstance(dechunk, SpatialDeChunk):
        plain = ops.dechunk_spatial(*args, GRID, 1.0, None, residual)
    else:
        plain = ops.dechunk_ema(*args, None, residual)
    (plain * weights).sum().backward()
    sign = torch.where(p > 0.5, 1.0, -1.0)
    torch.testing.assert_close(with_gate.grad - detached.grad, sign * (weights * bare).sum(-1))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dechunk", dechunks(), ids=["spatial", "ema"])
def test_dechunk_computes_in_float32_under_autocast(dechunk: nn.Module, backend: str) -> None:
    x, p, residual = inputs()
    tokens, sel = ChunkLayer()(x, p)
    with ops.use_backend(backend):
        exact = dechunk(tokens, p, sel, residual)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(dechunk(tokens, p, sel, residual), exact)
