"""Spatial de-chunking against the float64 definition."""

import pytest
import torch
from support import cases
from support.accuracy import check_against_reference, differentiate, to_float64
from support.inputs import PATTERNS, randn

from dcdit import ops
from dcdit.ops import reference
from dcdit.ops.numerics import window_radius

NAMES = ["h", "p", "gate", "residual"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", [(1, 1), (1, 13), (9, 1), (5, 7), (16, 16)], ids=str)
@pytest.mark.usefixtures("host_reads")
def test_patterns_and_grids(pattern: str, grid: tuple[int, int]) -> None:
    check_against_reference(ops.dechunk_spatial, *cases.dechunk_spatial(3, grid, 24, pattern=pattern))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("pattern", ["random", "ties", "all"])
@pytest.mark.parametrize("mode", [{}, {"budget": 40}], ids=["threshold", "budget"])
@pytest.mark.usefixtures("host_reads")
def test_sigmas(sigma: float, pattern: str, mode: dict[str, int]) -> None:
    args = cases.dechunk_spatial(2, (24, 20), 16, pattern=pattern, sigma=sigma, **mode)
    check_against_reference(ops.dechunk_spatial, *args)


@pytest.mark.parametrize("width", [8, 100, 1152])
def test_widths(width: int, dtype: torch.dtype) -> None:
    check_against_reference(ops.dechunk_spatial, *cases.dechunk_spatial(2, (7, 11), width, dtype=dtype))


@pytest.mark.usefixtures("host_reads")
def test_many_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    from dcdit.ops._torch import row_slices

    monkeypatch.setattr(row_slices, "SLICE_ROWS", 10)
    monkeypatch.setattr(row_slices, "SLICE_ELEMENTS", 1)
    # Slices of several images, of several grid rows of one image, and of one grid row that is longer than a slice.
    for grid in ((2, 2), (5, 4), (3, 17)):
        check_against_reference(ops.dechunk_spatial, *cases.dechunk_spatial(5, grid, 8))


@pytest.mark.parametrize("missing", [("gate",), ("residual",), ("gate", "residual")], ids=str)
def test_optional_arguments(missing: tuple[str, ...], dtype: torch.dtype) -> None:
    h, p, sel, grid, sigma, gate, residual = cases.dechunk_spatial(2, (5, 7), 24, dtype=dtype)
    gate = None if "gate" in missing else gate
    residual = None if "residual" in missing else residual
    check_against_reference(ops.dechunk_spatial, h, p, sel, grid, sigma, gate, residual)


def test_lone_token_of_probability_0() -> None:
    # Its weight is only 1e-4, so the 1e-8 that is added to the normaliser shows.
    p = torch.zeros(2, 35)
    sel = ops.select_tokens(p)
    check_against_reference(ops.dechunk_spatial, randn(2, 8), p, sel, (5, 7), 1.0, p, randn(2, 35, 8))


def test_no_images() -> None:
    p = torch.zeros(0, 12)
    assert ops.dechunk_spatial(torch.zeros(0, 8), p, ops.select_tokens(p), (3, 4)).shape == (0, 12, 8)


@pytest.mark.usefixtures("host_reads")
def test_image_without_kept_tokens_is_zero() -> None:
    h, p, sel, grid, *_ = cases.dechunk_spatial(3, (5, 7), 8)
    first, last = sel.cu_seqlens[1:3].tolist()
    mask = sel.mask.clone()
    mask[1] = False
    sel, h = ops.select_from_mask(mask), torch.cat([h[:first], h[last:]])
    check_against_reference(ops.dechunk_spatial, h, p, sel, grid, 1.0)
    assert not ops.dechunk_spatial(h, p, sel, grid)[1].any()
    residual = randn(3, 35, 8)
    assert torch.equal(ops.dechunk_spatial(h, p, sel, grid, residual=residual)[1], residual[1])


@pytest.mark.usefixtures("host_reads")
def test_garbage_in_padding_stays_there(dtype: torch.dtype) -> None:
    h, p, sel, *rest = cases.dechunk_spatial(2, (5, 7), 8, dtype=dtype, capacity=60)
    padding = (sel.indices < 0)[:, None]
    check_against_reference(ops.dechunk_spatial, h, p, sel, *rest)
    results = [
        differentiate(ops.dechunk_spatial, (h.masked_fill(padding, x), p, sel, *rest)) for x in (0.0, float("nan"))
    ]
    for clean, dirty in zip(*(outputs + grads for outputs, grads in results), strict=True):
        assert torch.equal(clean, dirty)
    assert not results[1][1][0].masked_select(padding).any()


@pytest.mark.usefixtures("host_reads")
def test_images_are_independent() -> None:
    h, p, sel, grid, sigma, gate, residual = cases.dechunk_spatial(3, (5, 7), 24)
    together = ops.dechunk_spatial(h, p, sel, grid, sigma, gate, residual)
    for b, rows in enumerate(h.split(sel.lengths.tolist())):
        one = slice(b, b + 1)
        alone = ops.dechunk_spatial(rows, p[one], ops.select_tokens(p[one]), grid, sigma, gate[one], residual[one])
        assert torch.equal(together[one], alone)


def test_strided_input() -> None:
    h, p, sel, grid, sigma, gate, residual = cases.dechunk_spatial(2, (5, 7), 24)
    h = randn(24, h.shape[0]).t()
    residual = randn(35, 2, 48).transpose(0, 1)[..., ::2]
    p, gate = (x[..., None].expand(-1, -1, 3).contiguous()[..., 1] for x in (p, gate))
    check_against_reference(ops.dechunk_spatial, h, p, sel, grid, sigma, gate, residual)


def test_repeatable() -> None:
    args = cases.dechunk_spatial(2, (16, 16), 24)
    first, second = differentiate(ops.dechunk_spatial, args), differentiate(ops.dechunk_spatial, args)
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))


def test_only_the_wanted_gradients() -> None:
    h, p, sel, grid, sigma, gate, residual = cases.dechunk_spatial(2, (5, 7), 8)
    full = dict(
        zip(NAMES, differentiate(ops.dechunk_spatial, (h, p, sel, grid, sigma, gate, residual))[1], strict=True)
    )
    for name in NAMES:
        given = {"h": h, "p": p, "gate": gate, "residual": residual}
        given[name] = given[name].detach().clone().requires_grad_()
        out = ops.dechunk_spatial(given["h"], given["p"], sel, grid, sigma, given["gate"], given["residual"])
        (grad,) = torch.autograd.grad(out, given[name], randn(*out.shape, seed=7))
        assert torch.equal(grad, full[name])


def test_broadcast_gradient() -> None:
    h, p, sel, grid, sigma, gate, residual = cases.dechunk_spatial(2, (5, 7), 24)
    leaves = [x.requires_grad_() for x in (h, p, gate, residual)]
    out = ops.dechunk_spatial(h, p, sel, grid, sigma, gate, residual)
    broadcast = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    dense = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for actual, expected in zip(broadcast, dense, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_gradcheck() -> None:
    h, p, sel, grid, sigma, _, residual = cases.dechunk_spatial(2, (3, 4), 3, sigma=1.5)
    h, p, residual = (x.double().requires_grad_() for x in (h, p, residual))
    assert torch.autograd.gradcheck(
        lambda h, p, r: ops.dechunk_spatial(h, p, sel, grid, sigma, None, r), (h, p, residual)
    )


@pytest.mark.parametrize("mode", [{}, {"budget": 40}], ids=["threshold", "budget"])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_float64_truncates_below_float64_rounding(mode: dict[str, int], sigma: float) -> None:
    args = tuple(to_float64(x) for x in cases.dechunk_spatial(1, (24, 20), sigma=sigma, **mode))
    results = [differentiate(fn, args) for fn in (ops.dechunk_spatial, reference.dechunk_spatial)]
    for actual, exact in zip(*(outputs + grads for outputs, grads in results), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("own", [0.5001, 1e-4], ids=["threshold", "budget"])
def test_window_is_wide_enough_for_a_lone_token(sigma: float, own: float) -> None:
    """The worst case of the truncation: a token of low probability, alone in its window, with all kept outside."""
    radius = window_radius(sigma, own, torch.float32)
    side = 4 * radius + 1
    row = torch.arange(side) - side // 2
    p = torch.where(torch.maximum(row[:, None].abs(), row.abs()) > radius, 1.0, 0.0)
    p[side // 2, side // 2] = own
    p = p.view(1, -1)
    sel = ops.select_tokens(p) if own > 0.5 else ops.select_tokens(p, budget=int((p > 0).sum()))
    assert sel.mask.view(side, side)[side // 2, side // 2]
    h = torch.full((sel.indices.numel(), 8), 1000.0)
    lone = sel.packed_rows.view(side, side)[side // 2, side // 2]
    h[lone] = 1.0
    out = ops.dechunk_spatial(h, p, sel, (side, side), sigma).view(side, side, 8)[side // 2, side // 2]
    exact = reference.dechunk_spatial(h.double(), p.double(), sel, (side, side), sigma)
    error = (out.double() - exact.view(side, side, 8)[side // 2, side // 2]).abs().max()
    # At most half a unit in the last place of the far tokens' 1000 may arrive.
    assert error <= 1000 * torch.finfo(torch.float32).eps / 2
