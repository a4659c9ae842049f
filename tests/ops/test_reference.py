"""The definitions: gradcheck in float64, and values computed by hand."""

import math

import pytest
import torch
from support.inputs import generator, random_cu_seqlens, random_probs
from torch.autograd import gradcheck

from dcdit.ops import TokenSelection, reference

CU = random_cu_seqlens(3, 0, 4)


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed)).requires_grad_()


def probs(*shape: int, seed: int = 0) -> torch.Tensor:
    return random_probs(*shape, keep=0.4, seed=seed).double().requires_grad_()


def select(p: torch.Tensor, *args: object) -> TokenSelection:
    return reference.select_tokens(p.detach(), *args)


def test_gradcheck_boundary_probabilities() -> None:
    assert gradcheck(reference.boundary_prob_cosine, (leaf(2, 5, 4), leaf(2, 5, 4, seed=1)))
    assert gradcheck(reference.boundary_prob_cosine, (leaf(7, 4), leaf(7, 4, seed=1), CU))
    weight = (leaf(4, 3, 3).detach() / 9).requires_grad_()
    assert gradcheck(reference.boundary_prob_cosine2d, (leaf(2, 6, 4), leaf(2, 6, 4, seed=1), weight, (2, 3)))
    args = leaf(2, 16, 2, 3), leaf(16), leaf(16, seed=1), leaf(16, seed=2), leaf(seed=3)
    assert gradcheck(reference.boundary_prob_predictability, args)


def test_gradcheck_group_norm() -> None:
    args = leaf(8), leaf(8, seed=1), leaf(2, 8, seed=2)
    for x in (leaf(2, 6, 8), leaf(2, 8, 2, 3)):
        assert gradcheck(lambda x, *rest: reference.group_norm_silu(x, 4, *rest), (x, *args))


def test_gradcheck_packing() -> None:
    sel = select(probs(2, 6))
    assert gradcheck(lambda x, bias: reference.gather_tokens(x, sel, bias), (leaf(2, 6, 3), leaf(6, 3)))
    assert gradcheck(lambda t: reference.scatter_tokens(t, sel, 2.0), (leaf(sel.indices.numel(), 3),))


def test_gradcheck_dechunk() -> None:
    p = probs(2, 6)
    sel = select(p)
    h, residual = leaf(sel.indices.numel(), 3), leaf(2, 6, 3)
    assert gradcheck(lambda h, p, r: reference.dechunk_spatial(h, p, sel, (2, 3), 1.5, None, r), (h, p, residual))
    assert gradcheck(lambda h, p, r: reference.dechunk_ema(h, p, sel, None, r), (h, p, residual))


def test_gradcheck_loss_and_modulation() -> None:
    assert gradcheck(lambda p: reference.ratio_loss(p, p.detach() > 0.5, 4.0, 2), (probs(4, 6),))
    rows, tables = [leaf(9, 4), leaf(9, 4, seed=1)], [leaf(3, 4, seed=2 + i) for i in range(3)]
    assert gradcheck(lambda t, *m: reference.modulated_layer_norm(t, *m, CU), (rows[0], *tables[:2]))
    assert gradcheck(lambda x, y, gate: reference.gated_add(x, y, gate, CU), (*rows, tables[0]))
    assert gradcheck(lambda *a: reference.gated_add_modulated_layer_norm(*a, CU), (*rows, *tables))


def test_gate_is_straight_through() -> None:
    p = probs(2, 6)
    sel = select(p)
    h, gate = leaf(sel.indices.numel(), 3), probs(2, 6, seed=1)
    for dechunk in (reference.dechunk_ema, lambda h, p, sel, *a: reference.dechunk_spatial(h, p, sel, (2, 3), 1.0, *a)):
        plain, gated = dechunk(h, p, sel), dechunk(h, p, sel, gate)
        assert torch.equal(plain, gated)
        grad = torch.randn_like(plain)
        (grad_gate,) = torch.autograd.grad(gated, gate, grad)
        torch.testing.assert_close(grad_gate, (grad * plain).sum(-1))


def test_cosine_by_hand() -> None:
    east, north = [1.0, 0.0], [0.0, 2.0]
    q = torch.tensor([[east, east, north, north]])
    k = torch.tensor([[east, east, [-1.0, 0.0], east]])
    # The first one; equal rows; opposite rows; rows at right angles.
    assert reference.boundary_prob_cosine(q, k).tolist() == [[1.0, 0.0, 1.0, 0.5]]
    starts = random_cu_seqlens(2, 2)
    assert reference.boundary_prob_cosine(q[0], k[0], starts).tolist() == [1.0, 0.0, 1.0, 0.5]
    assert reference.boundary_prob_cosine(q[0], k[0], random_cu_seqlens(3, 1)).tolist() == [1.0, 0.0, 1.0, 1.0]


def test_cosine2d_by_hand() -> None:
    ones = torch.ones(1, 9, 1)
    p = reference.boundary_prob_cosine2d(ones, ones, torch.full((1, 3, 3), 1 / 9), (3, 3))
    neighbours = torch.tensor([4.0, 6, 4, 6, 9, 6, 4, 6, 4])
    torch.testing.assert_close(p[0], (1 - neighbours / 9) / 2)


def test_predictability_by_hand() -> None:
    features = torch.zeros(1, 8, 2, 2)
    zero, bias = torch.zeros(8), torch.tensor([math.log(3.0)])
    p = reference.boundary_prob_predictability(features, zero, zero, zero, bias)
    torch.testing.assert_close(p, torch.tensor([[1.0, 0.75, 0.75, 1.0]]))


def test_group_norm_silu_by_hand() -> None:
    x = torch.tensor([[[1.0, 5.0, 2.0, 2.0], [3.0, 7.0, 2.0, 2.0]]])  # means 4 and 2, variances 5 and 0
    weight, bias = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    for shift in (None, torch.full((1, 4), 7.0)):  # a number that all channels have in common changes nothing
        y = reference.group_norm_silu(x, 2, weight, bias, shift, eps=0.0 if shift is None else 1e-12)
        expected = torch.tensor([[-3.0, 1.0], [-1.0, 3.0]]) / math.sqrt(5)
        torch.testing.assert_close(y[0, :, :2], expected * expected.sigmoid())
        if shift is not None:
            torch.testing.assert_close(y[0, :, 2:], torch.tensor([[0.0, 1 / (1 + math.exp(-1))]] * 2))


def test_ratio_loss_is_one_at_its_target() -> None:
    p = torch.tensor([[0.9, 0.1 / 3, 0.1 / 3, 0.1 / 3]])
    mask = torch.tensor([[True, False, False, False]])
    assert reference.ratio_loss(p, mask, 4.0).item() == pytest.approx(1.0, rel=1e-6)
    everything = torch.ones(1, 4, dtype=torch.bool)
    # F = 1, G = 1: N/(N-1) * (N-1) * 1.
    assert reference.ratio_loss(torch.ones(1, 4), everything, 4.0).item() == pytest.approx(4.0, rel=1e-6)


def test_ema_by_hand() -> None:
    p = torch.tensor([[0.25, 0.75, 0.1, 0.6, 0.2]], dtype=torch.float64)
    sel = select(p)
    h = torch.tensor([[8.0], [2.0]], dtype=torch.float64)
    first = 0.75 * 8.0
    second = 0.6 * 2.0 + 0.4 * first
    expected = torch.tensor([0.0, first, first, second, second], dtype=torch.float64)
    torch.testing.assert_close(reference.dechunk_ema(h, p, sel)[0, :, 0], expected)


def test_spatial_by_hand() -> None:
    p = torch.tensor([[0.8, 0.1, 0.1, 0.6]], dtype=torch.float64)
    sel = select(p)
    h = torch.tensor([[1.0], [5.0]], dtype=torch.float64)
    near = math.exp(-9 / 2)
    smoothed = [(0.8 * 1 + near * 0.6 * 5) / (0.8 + near * 0.6), (near * 0.8 * 1 + 0.6 * 5) / (near * 0.8 + 0.6)]
    values = [0.8 * 1 + 0.2 * smoothed[0], 0.6 * 5 + 0.4 * smoothed[1]]
    expected = torch.tensor([values[0], values[0], values[1], values[1]], dtype=torch.float64)
    torch.testing.assert_close(reference.dechunk_spatial(h, p, sel, (1, 4))[0, :, 0], expected, rtol=1e-7, atol=0)


def test_spatial_tie_goes_to_the_lowest_raster_index() -> None:
    p = torch.tensor([[0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1]])
    sel = select(p)
    h = torch.arange(4.0)[:, None]
    # The values are far apart and almost not smoothed, so they tell which token a position took.
    taken = reference.dechunk_spatial(h, p, sel, (3, 3), 0.1)[0, :, 0].round()
    assert taken.tolist() == [0, 0, 0, 1, 0, 2, 1, 3, 2]
