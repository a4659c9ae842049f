"""EMA de-chunking against the float64 definition."""

import pytest
import torch
from support import cases
from support.accuracy import check_against_reference, differentiate
from support.inputs import packed_selection, randn, random_cu_seqlens, random_probs, random_selection
from torch import Tensor

from dcdit import ops
from dcdit.ops import reference

PATTERNS = ["random", "ties", "one", "all", "none", "extreme"]
LENGTHS = [(0,), (1,), (300,), (17, 0, 1, 33), (200, 1, 1, 1)]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(0, 7), (3, 1), (4, 50), (1, 700)], ids=str)
@pytest.mark.usefixtures("host_reads")
def test_grid_batches(pattern: str, shape: tuple[int, int]) -> None:
    check_against_reference(ops.dechunk_ema, *cases.dechunk_ema(*random_selection(*shape, pattern=pattern), 16))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.usefixtures("host_reads")
def test_packed(pattern: str, lengths: tuple[int, ...]) -> None:
    check_against_reference(ops.dechunk_ema, *cases.dechunk_ema(*packed_selection(*lengths, pattern=pattern), 16))


@pytest.mark.parametrize("width", [8, 100, 1152])
def test_widths(width: int, dtype: torch.dtype) -> None:
    check_against_reference(ops.dechunk_ema, *cases.dechunk_ema(*random_selection(2, 77), width, dtype))


@pytest.mark.parametrize("missing", [(3,), (4,), (3, 4)], ids=str)
def test_optional_arguments(missing: tuple[int, ...], dtype: torch.dtype) -> None:
    args = [None if i in missing else x for i, x in enumerate(cases.dechunk_ema(*random_selection(2, 40), 24, dtype))]
    check_against_reference(ops.dechunk_ema, *args)


@pytest.mark.parametrize("value", [0.0, 1e-6, 0.501, 1 - 1e-6, 1.0])
def test_stable_at_both_ends(value: float) -> None:
    # A scan through ratios of cumulative products underflows here.
    p = torch.full((1, 600), value)
    check_against_reference(ops.dechunk_ema, *cases.dechunk_ema(p, ops.select_tokens(p, budget=600)))


def test_long_sequence() -> None:
    p = random_probs(1, 65_536, keep=0.5)
    h, _, sel, gate, residual = cases.dechunk_ema(p, ops.select_tokens(p), 4)
    out, grads = differentiate(ops.dechunk_ema, (h, p, sel, gate, residual))
    state, expected = torch.zeros(4, dtype=torch.float64), []
    q = p.double().clamp(1e-4, 1 - 1e-4)[0].index_select(0, sel.indices)
    for row, q_m in zip(h.double(), q, strict=True):
        state = q_m * row + (1 - q_m) * state
        expected.append(state)
    rows = torch.stack(expected)[(sel.mask[0].cumsum(0) - 1).clamp(min=0)]
    rows[: int(sel.indices[0])] = 0
    torch.testing.assert_close(out[0][0].double(), rows + residual[0].double(), rtol=1e-5, atol=1e-5)
    assert all(grad.isfinite().all() for grad in grads)


def test_gradient_of_p_stops_at_the_clamp() -> None:
    p = torch.tensor([[0.0, 1e-4, 0.5, 1 - 1e-4, 1.0]])
    h, _, sel, *_ = cases.dechunk_ema(p, ops.select_tokens(p, budget=5), 4)
    _, (_, grad_p) = differentiate(ops.dechunk_ema, (h, p, sel))
    assert (grad_p[0] != 0).tolist() == [False, True, True, True, False]


@pytest.mark.usefixtures("host_reads")
def test_garbage_in_padding_stays_there(dtype: torch.dtype) -> None:
    h, p, sel, *rest = cases.dechunk_ema(*random_selection(2, 35, capacity=60), 8, dtype)
    padding = (sel.indices < 0)[:, None]
    check_against_reference(ops.dechunk_ema, h, p, sel, *rest)
    results = [differentiate(ops.dechunk_ema, (h.masked_fill(padding, x), p, sel, *rest)) for x in (0.0, float("nan"))]
    for clean, dirty in zip(*(outputs + grads for outputs, grads in results), strict=True):
        assert torch.equal(clean, dirty)
    assert not results[1][1][0].masked_select(padding).any()


def test_packed_equals_each_sequence_alone() -> None:
    lengths = (17, 1, 33, 64)
    h, p, sel, gate, residual = cases.dechunk_ema(*packed_selection(*lengths), 24)
    packed = ops.dechunk_ema(h, p, sel, gate, residual)
    parts = zip(h.split(sel.lengths.tolist()), *(x.split(lengths) for x in (p, gate, residual)), strict=True)
    alone = [ops.dechunk_ema(a, b, ops.select_tokens(b, random_cu_seqlens(b.shape[0])), c, d) for a, b, c, d in parts]
    # Blocks start elsewhere in the packed buffer: equal to rounding.
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-6, atol=1e-6)


def test_a_sequence_does_not_see_the_others() -> None:
    h, p, sel, *_ = cases.dechunk_ema(*random_selection(2, 40))
    changed = h.clone()
    changed[: int(sel.cu_seqlens[1])] = 1e30
    assert torch.equal(ops.dechunk_ema(h, p, sel)[1], ops.dechunk_ema(changed, p, sel)[1])


def test_repeatable() -> None:
    args = cases.dechunk_ema(*random_selection(2, 300), 24)
    first, second = differentiate(ops.dechunk_ema, args), differentiate(ops.dechunk_ema, args)
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))


@pytest.mark.parametrize("mode", [{}, {"budget": 16}], ids=["threshold", "whole blocks"])
def test_strided_input(mode: dict[str, int]) -> None:
    h, p, sel, gate, _ = cases.dechunk_ema(*random_selection(2, 35, **mode), 24)
    residual = randn(35, 2, 48).transpose(0, 1)[..., ::2]
    check_against_reference(ops.dechunk_ema, randn(24, h.shape[0]).t(), p, sel, gate, residual)


def test_broadcast_gradient() -> None:
    h, p, sel, gate, residual = cases.dechunk_ema(*random_selection(2, 35), 24)
    leaves = [x.requires_grad_() for x in (h, p, gate, residual)]
    out = ops.dechunk_ema(h, p, sel, gate, residual)
    broadcast = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    dense = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for actual, expected in zip(broadcast, dense, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_gradcheck() -> None:
    args = cases.dechunk_ema(*random_selection(2, 20), 3)
    h, p, sel, _, residual = (x.double() if isinstance(x, Tensor) else x for x in args)
    leaves = [x.requires_grad_() for x in (h, p, residual)]
    assert torch.autograd.gradcheck(lambda h, p, r: ops.dechunk_ema(h, p, sel, None, r), leaves)
    expected = reference.dechunk_ema(h, p, sel, None, residual)
    torch.testing.assert_close(ops.dechunk_ema(h, p, sel, None, residual), expected, rtol=1e-13, atol=1e-13)
