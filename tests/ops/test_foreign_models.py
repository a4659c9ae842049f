"""Blocks of other people's models on a selection of their tokens, beside the same computed densely with a mask.

A dense block attends to kept tokens alone, by a mask of the keys. What it computes at the other positions is ignored.
"""

import pytest
import torch
import torch.nn.functional as F
from support.inputs import randn, random_probs
from torch import Tensor, nn

from dcdit import ops
from dcdit.ops import TokenSelection

B, GRID, D, HEADS = 3, (4, 5), 16, 4
L, WIDTH = GRID[0] * GRID[1], D // HEADS
SIZES = {"exact": {}, "budget": {"budget": 8}, "capacity": {"capacity": 60}}
modes = pytest.mark.parametrize("mode", SIZES.values(), ids=SIZES)
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from support import interpreter_scan

    interpreter_scan.install(monkeypatch)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, WIDTH))


def attend_densely(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """(B, L, heads, d_h); ``keys`` (B, L_k) says which keys are there."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, keys[:, None, None]).transpose(1, 2).flatten(2)


def check(packed: Tensor, dense: Tensor, sel: TokenSelection, inputs: tuple[Tensor, ...]) -> None:
    """The same values at the kept tokens, and the same gradients of the inputs."""
    kept = int(sel.cu_seqlens[-1])
    torch.testing.assert_close(packed[:kept], dense[sel.mask], rtol=1e-5, atol=1e-5)
    flow = randn(kept, packed.shape[1], seed=9)
    grads = (
        torch.autograd.grad(packed[:kept], inputs, flow, retain_graph=True),
        torch.autograd.grad(dense[sel.mask], inputs, flow, retain_graph=True),
    )
    for grad, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@modes
@backends
def test_a_vit_with_a_class_token_and_two_registers(backend: str, mode: dict[str, int]) -> None:
    torch.manual_seed(0)
    extra, norm, qkv, out = 3, nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
    x, position = randn(B, extra + L, D).requires_grad_(), randn(extra + L, D, seed=1)
    p = random_probs(B, L, keep=0.4)
    with ops.use_backend(backend):
        sel = ops.select_tokens(p, extra_tokens=extra, **mode)
        assert sel.mask[:, :extra].all()
        t = ops.gather_tokens(x, sel, position)
        q, k, v = (heads(part) for part in qkv(norm(t)).chunk(3, -1))
        attended = ops.varlen_attention(q, k, v, sel.cu_seqlens, sel.max_seqlen, padding="capacity" in mode)
        packed = t + out(attended.flatten(1))
        spread = ops.dechunk_spatial(packed, p, sel, GRID)
        images = ops.dechunk_spatial(ops.gather_tokens(x, sel), p, sel, GRID)
    tokens = x + position
    q, k, v = (heads(part) for part in qkv(norm(tokens)).chunk(3, -1))
    dense = tokens + out(attend_densely(q, k, v, sel.mask))
    check(packed, dense, sel, (x, qkv.weight))
    # The class token and the registers of each image come back first, and no smoothing has touched them.
    torch.testing.assert_close(spread[:, :extra], dense[:, :extra], rtol=1e-5, atol=1e-5)
    assert torch.equal(images[:, :extra], x[:, :extra])


@modes
@backends
def test_text_between_the_images_always_stays(backend: str, mode: dict[str, int]) -> None:
    p, text = random_probs(B, L, keep=0.3), torch.zeros(B, L, dtype=torch.bool)
    text[:, 2:7] = True
    with ops.use_backend(backend):
        sel = ops.select_tokens(p, always=text, **mode)
    assert sel.mask[text].all()
    if "budget" in mode:
        best = p.masked_fill(text, -1).argsort(1, descending=True)[:, :3].sort(1).values
        kept = [row.nonzero().flatten().tolist() for row in sel.mask & ~text]
        assert kept == best.tolist()


@modes
@backends
def test_cross_attention_to_text(backend: str, mode: dict[str, int]) -> None:
    torch.manual_seed(0)
    to_q, to_kv = nn.Linear(D, D), nn.Linear(D, D)  # half as many heads of k and v
    lengths = torch.tensor([7, 0, 3])
    x, text = randn(B, L, D).requires_grad_(), randn(B, 7, D, seed=1).requires_grad_()
    real = torch.arange(7) < lengths[:, None]
    with ops.use_backend(backend):
        sel = ops.select_tokens(random_probs(B, L, keep=0.4), **mode)
        words = ops.select_from_mask(real)
        q = heads(to_q(ops.gather_tokens(x, sel)))
        k, v = heads(to_kv(ops.gather_tokens(text, words))).chunk(2, 1)
        packed = ops.varlen_attention(
            q, k, v, sel.cu_seqlens, sel.max_seqlen, padding="capacity" in mode,
            cu_seqlens_k=words.cu_seqlens, max_seqlen_k=words.max_seqlen,
        ).flatten(1)  # fmt: skip
    k, v = heads(to_kv(text)).chunk(2, 2)
    some = torch.where(lengths[:, None] == 0, torch.arange(7) == 0, real)  # the softmax of nothing would be NaN
    dense = attend_densely(heads(to_q(x)), k, v, some) * (lengths > 0)[:, None, None]
    check(packed, dense, sel, (x, text, to_q.weight, to_kv.weight))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x (..., heads, d_h) by angles (..., 1, d_h / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


@modes
@backends
def test_a_block_with_rms_norm_and_rope(backend: str, mode: dict[str, int]) -> None:
    torch.manual_seed(0)
    qkv, weight = nn.Linear(D, 3 * D), (1 + 0.1 * randn(D, seed=3)).requires_grad_()
    x, scale = randn(B, L, D).requires_grad_(), randn(B, D, seed=1).requires_grad_()
    rope = randn(1, L, 1, WIDTH // 2, seed=2)  # one table for all images
    coordinates = torch.cartesian_prod(torch.arange(GRID[0]), torch.arange(GRID[1]))
    with ops.use_backend(backend):
        sel = ops.select_tokens(random_probs(B, L, keep=0.4), **mode)
        t, angles = ops.gather_tokens(x, sel), ops.gather_tokens(rope, sel)
        places = ops.gather_tokens(coordinates[None], sel)
        normed = ops.modulated_rms_norm(t, None, scale, sel.cu_seqlens, 1e-5, weight)
        q, k, v = (heads(part) for part in qkv(normed).chunk(3, -1))
        q, k = rotate(q, angles), rotate(k, angles)
        packed = ops.varlen_attention(q, k, v, sel.cu_seqlens, sel.max_seqlen, padding="capacity" in mode).flatten(1)
    kept = int(sel.cu_seqlens[-1])
    assert torch.equal(places[:kept, 0] * GRID[1] + places[:kept, 1], sel.indices[:kept] % L)
    normed = F.rms_norm(x, (D,), weight, 1e-5) * (1 + scale[:, None])
    q, k, v = (heads(part) for part in qkv(normed).chunk(3, -1))
    dense = attend_densely(rotate(q, rope), rotate(k, rope), v, sel.mask)
    check(packed, dense, sel, (x, scale, weight, qkv.weight))
