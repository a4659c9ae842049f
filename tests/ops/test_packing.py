"""Gather and scatter move rows exactly, with exact gradients."""

from typing import Any

import pytest
import torch
from support import cases
from support.accuracy import check_against_reference, differentiate
from support.inputs import randn, random_cu_seqlens, random_probs, random_selection

from dcdit import ops
from dcdit.ops import reference

PATTERNS = ["random", "one", "all", "none"]
pytestmark = pytest.mark.usefixtures("host_reads")


def assert_exact(op: Any, *args: Any) -> None:
    results = [differentiate(fn, args) for fn in (op, getattr(reference, op.__name__))]
    for actual, expected in zip(*(outputs + grads for outputs, grads in results), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("width", [8, 33, 1152])
def test_exact(pattern: str, width: int, dtype: torch.dtype) -> None:
    p = random_probs(3, 35, pattern=pattern)
    for mode in ({}, {"capacity": 50}, {"budget": 4}):
        sel = ops.select_tokens(p, **mode)
        assert_exact(ops.gather_tokens, randn(3, 35, width, dtype=dtype), sel)
        assert_exact(ops.scatter_tokens, randn(sel.indices.numel(), width, dtype=dtype), sel, -1.5)


@pytest.mark.parametrize("mode", [{}, {"capacity": 50}])
def test_bias(dtype: torch.dtype, mode: dict[str, int]) -> None:
    sel = ops.select_tokens(random_probs(3, 35), **mode)
    check_against_reference(ops.gather_tokens, randn(3, 35, 24, dtype=dtype), sel, randn(35, 24))
    check_against_reference(ops.gather_tokens, randn(3, 35, 24, dtype=dtype), sel, randn(35, 24, dtype=dtype))


def test_packed_source(dtype: torch.dtype) -> None:
    cu_seqlens = random_cu_seqlens(0, 12, 1, 0, 7)
    sel = ops.select_tokens(random_probs(20), cu_seqlens)
    assert_exact(ops.gather_tokens, randn(20, 16, dtype=dtype), sel)
    assert_exact(ops.scatter_tokens, randn(sel.indices.numel(), 16, dtype=dtype), sel)


def test_no_images() -> None:
    sel = ops.select_tokens(torch.zeros(0, 6))
    assert ops.gather_tokens(randn(0, 6, 4), sel).shape == (0, 4)
    assert ops.gather_tokens(randn(0, 6, 4), sel, randn(6, 4)).shape == (0, 4)
    assert ops.scatter_tokens(randn(0, 4), sel).shape == (0, 6, 4)


def test_strided_input() -> None:
    sel = ops.select_tokens(random_probs(2, 20))
    assert_exact(ops.gather_tokens, randn(20, 2, 24).transpose(0, 1)[..., ::3], sel)
    tokens = randn(8, sel.indices.numel()).t()
    assert_exact(ops.scatter_tokens, tokens, sel)
    assert_exact(ops.gather_tokens, randn(20, 8).expand(2, 20, 8), sel)


def test_round_trip() -> None:
    sel = ops.select_tokens(random_probs(3, 35))
    x = randn(3, 35, 8)
    back = ops.scatter_tokens(ops.gather_tokens(x, sel), sel, float("nan"))
    kept = sel.mask[..., None]
    assert torch.equal(back.masked_select(kept), x.masked_select(kept))
    assert back.masked_select(~kept).isnan().all()


def test_gather_padding_is_zero() -> None:
    sel = ops.select_tokens(random_probs(2, 20), capacity=30)
    # Position 0 is what a clamped index of a padding row reads: its NaN must not get out.
    x = randn(2, 20, 8)
    x[0, 0] = float("nan")
    sel = sel._replace(indices=sel.indices.masked_fill(sel.indices == 0, -1))
    padding = sel.indices < 0
    assert not ops.gather_tokens(x, sel)[padding].any()
    assert not ops.gather_tokens(x, sel, randn(20, 8))[padding].any()


def test_garbage_in_padding_stays_there() -> None:
    sel = ops.select_tokens(random_probs(2, 20), capacity=30)
    padding = sel.indices < 0
    tokens = randn(30, 8).masked_fill(padding[:, None], float("nan")).requires_grad_()
    out = ops.scatter_tokens(tokens, sel)
    assert out.isfinite().all()
    (grad,) = torch.autograd.grad(out, tokens, torch.randn_like(out))
    assert grad.isfinite().all()
    assert not grad[padding].any()
    x, bias = randn(2, 20, 8).requires_grad_(), randn(20, 8).requires_grad_()
    out = ops.gather_tokens(x, sel, bias)
    grads = torch.autograd.grad(out, (x, bias), randn(30, 8).masked_fill(padding[:, None], float("nan")))
    assert all(grad.isfinite().all() for grad in grads)


def test_double_backward() -> None:
    sel = ops.select_tokens(random_probs(2, 6))
    x = randn(2, 6, 3).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: ops.gather_tokens(x, sel).pow(3), (x,))


@pytest.mark.parametrize("dtype", cases.INTEGERS, ids=str)
@pytest.mark.parametrize("token", cases.TOKENS, ids=str)
@pytest.mark.usefixtures("host_reads")
def test_integers(token: tuple[int, ...], dtype: torch.dtype) -> None:
    p = random_probs(3, 7)
    for sel in (
        ops.select_tokens(p),
        ops.select_tokens(p, capacity=19),
        ops.select_tokens(p, budget=2, extra_tokens=1),
    ):
        length, fill = sel.mask.shape[1], 1 if dtype == torch.bool else 117
        t = cases.integers(sel.indices.shape[0], *token, dtype=dtype)
        assert torch.equal(ops.scatter_tokens(t, sel, fill), reference.scatter_tokens(t, sel, fill))
        for images in (1, 3):
            x = cases.integers(images, length, *token, dtype=dtype)
            packed = ops.gather_tokens(x, sel)
            assert packed.dtype == dtype and torch.equal(packed, reference.gather_tokens(x, sel))
            assert torch.equal(packed, ops.gather_tokens(x.expand(3, length, *token), sel))


@pytest.mark.parametrize("token", cases.TOKENS, ids=str)
@pytest.mark.usefixtures("host_reads")
def test_tokens_of_any_shape(token: tuple[int, ...], dtype: torch.dtype) -> None:
    _, sel = random_selection(3, 7, capacity=19)
    check_against_reference(ops.scatter_tokens, randn(19, *token, dtype=dtype), sel, 2.5)
    for images in (1, 3):
        x = randn(images, 7, *token, dtype=dtype)
        check_against_reference(ops.gather_tokens, x, sel)
        for narrow in (token, (*token[:-1], 1)[: len(token)]):
            check_against_reference(ops.gather_tokens, x, sel, randn(7, *narrow, seed=1))


def test_a_narrow_bias_leaves_the_other_channels() -> None:
    sel = ops.select_tokens(torch.tensor([[0.9, 0.1, 0.8]]), capacity=3)
    packed = ops.gather_tokens(torch.ones(1, 3, 4), sel, torch.tensor([[10.0], [20.0], [30.0]]))
    assert packed.tolist() == [[11, 1, 1, 1], [31, 1, 1, 1], [0, 0, 0, 0]]
