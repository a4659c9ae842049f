"""Group norm and SiLU on the PyTorch backend, against the float64 definition."""

import pytest
import torch
import torch.nn.functional as F
from support import cases
from support.accuracy import check_against_reference, differentiate
from support.inputs import randn

from dcdit import ops

SHAPES = [(0, 8, 2, 3), (2, 8, 0, 3), (2, 8, 1, 1), (2, 96, 5, 7), (1, 288, 16, 16), (1, 1152, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shifted", [False, True], ids=["", "shifted"])
def test_shapes(shifted: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    groups = 32 if shape[1] > 64 else 4
    args = cases.group_norm_silu("channels_last", *shape, groups=groups, dtype=dtype, shifted=shifted)
    check_against_reference(ops.group_norm_silu, *args)


@pytest.mark.parametrize("layout", ["tokens", *cases.MEMORY_FORMATS])
def test_layouts(layout: str) -> None:
    args = cases.group_norm_silu(layout, 2, 24, 5, 7, groups=8)
    check_against_reference(ops.group_norm_silu, *args)
    memory = torch.contiguous_format if layout == "tokens" else torch.channels_last
    assert ops.group_norm_silu(*args).is_contiguous(memory_format=memory)


def test_is_what_pytorch_computes() -> None:
    x, groups, weight, bias, shift, eps = cases.group_norm_silu("channels_last", 2, 24, 5, 7, groups=8)
    with ops.use_backend("reference"):
        y = ops.group_norm_silu(x.double(), groups, weight.double(), bias.double(), shift.double(), eps)
    moved = (x + shift[:, :, None, None]).double()
    expected = F.silu(F.group_norm(moved.contiguous(), groups, weight.double(), bias.double(), eps))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", [3.0, 3000.0])
@pytest.mark.parametrize("layout", ["tokens", "channels_last", "channels_first"])
def test_far_from_zero(layout: str, mean: float, dtype: torch.dtype) -> None:
    """On a CPU, PyTorch's own norm of channels-last images is off by a multiple of the result here."""
    check_against_reference(
        ops.group_norm_silu, *cases.group_norm_silu(layout, 2, 24, 16, 16, groups=8, dtype=dtype, mean=mean)
    )


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_scores_far_from_zero(backend: str) -> None:
    """The tail of the router has the same norm."""
    features = 3000 + cases.predictability_features("channels_last", 2, 16, 8, 8)
    rest = cases.predictability_parameters(16)
    with ops.use_backend("reference"):
        expected = ops.boundary_prob_predictability(features.double(), *(value.double() for value in rest), 4)
    with ops.use_backend(backend):
        p = ops.boundary_prob_predictability(features, *rest, 4)
    torch.testing.assert_close(p.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", ["tokens", "channels_last"])
@pytest.mark.parametrize("wanted", [[0], [2], [3], [4], [2, 3]], ids=str)
def test_gradients_that_are_wanted(wanted: list[int], layout: str) -> None:
    """Of a frozen image too: PyTorch's own backward for channels-last images ends the process there."""
    args = cases.group_norm_silu(layout, 2, 24, 5, 7, groups=8, shifted=4 in wanted)
    _, every = differentiate(ops.group_norm_silu, args, [0, 2, 3, *([4] if 4 in wanted else [])])
    _, some = differentiate(ops.group_norm_silu, args, wanted)
    for number, grad in zip(wanted, some, strict=True):
        torch.testing.assert_close(grad, every[[0, 2, 3, 4].index(number)], rtol=1e-5, atol=1e-5)


def test_frozen_features_of_the_router() -> None:
    features = cases.predictability_features("channels_last", 2, 16, 4, 4)
    args = (features, *cases.predictability_parameters(16), 4, 1e-5)
    _, every = differentiate(ops.boundary_prob_predictability, args)
    _, some = differentiate(ops.boundary_prob_predictability, args, [1, 2, 3, 4])
    for grad, expected in zip(some, every[1:], strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)


def test_float64_parameters_raise_the_precision_but_not_the_dtype() -> None:
    x, groups, weight, bias, shift, eps = cases.group_norm_silu("tokens", 2, 24, 5, 7, groups=8)
    y = ops.group_norm_silu(x, groups, weight.double(), bias, shift, eps)
    assert y.dtype == torch.float32
    expected = ops.group_norm_silu(x.double(), groups, weight.double(), bias.double(), shift.double(), eps)
    torch.testing.assert_close(y, expected.float(), rtol=1e-6, atol=1e-6)


def test_the_result_shares_no_memory_with_x() -> None:
    x, *rest = cases.group_norm_silu("tokens", 2, 24, 5, 7, groups=8)
    before = x.clone()
    ops.group_norm_silu(x, *rest).zero_()
    assert torch.equal(x, before)
    assert not torch.equal(before, randn(*x.shape))


def test_frozen_features_of_one_position() -> None:
    """PyTorch's backward of a channels-last image that needs no gradient ends the process."""
    weight = randn(4, seed=1).requires_grad_()
    p = ops.boundary_prob_predictability(randn(2, 4, 1, 1), weight, randn(4), randn(4), torch.tensor(0.1), 2)
    (grad,) = torch.autograd.grad(p.sum(), weight, allow_unused=True)
    assert grad is None or not grad.any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_parameters_with_gaps_in_memory(backend: str) -> None:
    """As columns of a larger tensor are. PyTorch's own kernel would read what lies between."""
    x, tables = randn(2, 5, 8), randn(8, 3, seed=1)
    shift = randn(2, 8, 2, seed=2)[..., 0]
    plain = ops.reference.group_norm_silu(x, 4, tables[:, 0].clone(), tables[:, 1].clone(), shift.clone())
    with ops.use_backend(backend):
        y = ops.group_norm_silu(x, 4, tables[:, 0], tables[:, 1], shift)
    torch.testing.assert_close(y, plain)
