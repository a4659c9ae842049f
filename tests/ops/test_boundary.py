"""Boundary probabilities against the float64 definition."""

import pytest
import torch
from support import cases
from support.accuracy import (
    assert_close_to_reference,
    check_against_reference,
    check_rms_against_reference,
)
from support.inputs import randn, random_cu_seqlens

from dcdit import ops
from dcdit.ops import reference

SHAPES = [(0, 5, 8), (2, 1, 8), (3, 37, 16), (1, 64, 1152), (2, 30, 384)]


@pytest.mark.parametrize("shape", SHAPES)
def test_cosine(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_against_reference(ops.boundary_prob_cosine, *cases.boundary_prob_cosine(*shape, dtype=dtype))


@pytest.mark.parametrize("lengths", [(0,), (1, 1), (0, 12, 1, 0, 7), (40, 2)])
def test_cosine_packed(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k = cases.boundary_prob_cosine(sum(lengths), 24, dtype=dtype)
    cu_seqlens = random_cu_seqlens(*lengths)
    check_against_reference(ops.boundary_prob_cosine, q, k, cu_seqlens)
    packed = ops.boundary_prob_cosine(q, k, cu_seqlens)
    alone = [
        ops.boundary_prob_cosine(a[None], b[None])[0] for a, b in zip(q.split(lengths), k.split(lengths), strict=True)
    ]
    assert torch.equal(packed, torch.cat(alone))


def test_cosine_first_is_exactly_one_and_passes_no_gradient() -> None:
    q, k = randn(2, 6, 8).requires_grad_(), randn(2, 6, 8, seed=1).requires_grad_()
    p = ops.boundary_prob_cosine(q, k)
    assert (p[:, 0] == 1).all()
    grads = torch.autograd.grad(p[:, 0].sum(), (q, k))
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_cosine_of_extreme_rows(scale: float) -> None:
    q, k = randn(1, 9, 8) * scale, randn(1, 9, 8, seed=1)
    q[0, 3] = 0
    k[0, 5] = 0
    p = ops.boundary_prob_cosine(q, k)
    torch.testing.assert_close(p, reference.boundary_prob_cosine(q, k), rtol=1e-6, atol=1e-6)
    assert p[0, 4] == 0.5
    assert p[0, 5] == 0.5


@pytest.mark.parametrize("op", [ops.boundary_prob_cosine, ops.boundary_prob_cosine2d], ids=["1d", "2d"])
def test_rows_shorter_than_the_smallest_norm(op: object) -> None:
    # Below 1e-12 the norm is a constant, so the gradient is no longer at right angles to the row.
    q, k = randn(1, 12, 8), randn(1, 12, 8, seed=1)
    q[0, ::2] *= 1e-14
    k[0, 1::3] *= 1e-14
    check_against_reference(op, q, k, *([randn(8, 3, 3) / 9, (3, 4)] if op is ops.boundary_prob_cosine2d else []))


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_cosine_stays_in_the_unit_interval(value: float) -> None:
    # Rounding takes a cosine of equal rows past 1.
    q = randn(1, 200, 7)
    p = ops.boundary_prob_cosine(q, value * q.roll(1, 1))
    assert p.min() >= 0
    assert p.max() <= 1


def test_cosine_strided_and_broadcast() -> None:
    q = randn(24, 3, 20).permute(1, 2, 0)
    check_against_reference(ops.boundary_prob_cosine, q, randn(3, 20, 48)[..., ::2])
    check_against_reference(ops.boundary_prob_cosine, q, randn(20, 24).expand(3, 20, 24))


@pytest.mark.parametrize(("images", "grid", "width"), [(0, (2, 3), 8), (2, (1, 1), 8), (3, (5, 7), 24)])
def test_cosine2d(images: int, grid: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    check_against_reference(
        ops.boundary_prob_cosine2d, *cases.boundary_prob_cosine2d(images, grid, width, dtype, dtype)
    )


def test_cosine2d_wide_and_strided() -> None:
    q, k = randn(35, 2, 1152).transpose(0, 1), randn(2, 35, 2304)[..., ::2]
    check_against_reference(ops.boundary_prob_cosine2d, q, k, randn(3, 3, 1152).permute(2, 0, 1) / 9, (5, 7))


def test_cosine2d_zero_rows() -> None:
    q, k = randn(1, 9, 8), randn(1, 9, 8, seed=1)
    q[0, 4] = k[0, 0] = 0
    weight = torch.full((8, 3, 3), 1 / 9)
    q.requires_grad_(), k.requires_grad_()
    p = ops.boundary_prob_cosine2d(q, k, weight, (3, 3))
    assert p[0, 4] == 0.5
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(p.sum(), (q, k)))


@pytest.mark.parametrize("shape", [(0, 8, 2, 3), (2, 8, 1, 1), (2, 96, 5, 7), (1, 288, 16, 16)])
@pytest.mark.parametrize("memory_format", ["channels_first", "channels_last"])
def test_predictability(memory_format: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    features = cases.predictability_features(memory_format, *shape, dtype=dtype)
    check_against_reference(ops.boundary_prob_predictability, features, *cases.predictability_parameters(shape[1]))


def test_predictability_gradient_of_the_bias() -> None:
    check_rms_against_reference(
        ops.boundary_prob_predictability,
        lambda seed: (
            cases.predictability_features("channels_first", 2, 96, 5, 7, seed=seed),
            *cases.predictability_parameters(96, seed=seed),
        ),
    )


def test_predictability_memory_formats_and_groups() -> None:
    features = cases.predictability_features("channels_first", 2, 24, 5, 7)
    norm_weight, norm_bias, out_weight, out_bias = rest = cases.predictability_parameters(24)
    expected = reference.boundary_prob_predictability(features.double(), *(x.double() for x in rest), 4, 1e-3)
    same = reference.boundary_prob_predictability(features, *rest, 4, 1e-3)
    for same_features in (
        features,
        features.contiguous(memory_format=torch.channels_last),
        features.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        parameters = norm_weight, norm_bias, out_weight.view(1, 24, 1, 1), out_bias.view(1)
        actual = ops.boundary_prob_predictability(same_features, *parameters, num_groups=4, eps=1e-3)
        assert_close_to_reference(actual, expected, same)


def test_predictability_forces_the_ends() -> None:
    features = cases.predictability_features("channels_first", 2, 8, 3, 3).requires_grad_()
    rest = cases.predictability_parameters(8)
    p = ops.boundary_prob_predictability(features, *rest)
    assert (p[:, [0, -1]] == 1).all()
    assert ((p[:, 1:-1] > 0) & (p[:, 1:-1] < 1)).all()
    (grad,) = torch.autograd.grad(p[:, [0, -1]].sum(), features)
    assert not grad.any()


def test_float64_in_float64_out() -> None:
    q, k = randn(2, 12, 8).double(), randn(2, 12, 8, seed=1).double()
    assert ops.boundary_prob_cosine(q, k).dtype == torch.float64
    torch.testing.assert_close(
        ops.boundary_prob_cosine(q, k), reference.boundary_prob_cosine(q, k), rtol=1e-13, atol=1e-13
    )
    weight = randn(8, 3, 3).double()
    actual, expected = (
        fn(q, k, weight, (3, 4)) for fn in (ops.boundary_prob_cosine2d, reference.boundary_prob_cosine2d)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("op", [ops.boundary_prob_cosine, ops.boundary_prob_cosine2d], ids=["1d", "2d"])
def test_gradcheck(op: object) -> None:
    args = [randn(2, 6, 4, seed=seed).double().requires_grad_() for seed in (0, 1)]
    if op is ops.boundary_prob_cosine2d:
        weight = (randn(4, 3, 3).double() / 9).requires_grad_()
        assert torch.autograd.gradcheck(lambda q, k, w: op(q, k, w, (2, 3)), (*args, weight))
    else:
        assert torch.autograd.gradcheck(op, args)
