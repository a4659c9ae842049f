"""Predictability boundary: against the definition, memory formats, splits, forced corners, robustness, and tracing."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import cases
from support.accuracy import check_against_reference, check_rms_against_reference, differentiate
from support.inputs import randn
from torch import Tensor

from dcdit import ops
from dcdit.kernels import boundary_predictability, launch
from dcdit.ops._triton import boundary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OP = ops.boundary_prob_predictability


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few positions then make several tiles, splits and blocks of channels."""
    configs = {
        "predictability_statistics": {"TILE": 32, "num_warps": 1},
        "predictability_channels_last": {"BLOCK_P": 4, "BLOCK_C": 16, "num_warps": 1},
        "predictability_channels_first": {"BLOCK_P": 8, "BLOCK_C": 8, "num_warps": 1},
    }
    monkeypatch.setattr(launch, "config_for", lambda name, *_, **__: configs[name])
    monkeypatch.setattr(boundary_predictability, "MAX_SPLITS", 4)
    monkeypatch.setattr(boundary_predictability, "MIN_TILES", 1)


case = given(
    images=st.integers(0, 2),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    width=st.sampled_from([(8, 8), (16, 4), (24, 8), (36, 3), (40, 1), (12, 12)]),
    memory_format=st.sampled_from(cases.MEMORY_FORMATS),
    dtype=st.sampled_from(DTYPES),
    parameter_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)


def check(
    images: int, grid: tuple[int, int], width: tuple[int, int], memory_format: str, dtype: torch.dtype,
    parameter_dtype: torch.dtype, seed: int, device: torch.device,
) -> None:  # fmt: skip
    if grid == (1, 1) and width[0] == width[1]:
        width = (8, 4)  # PyTorch refuses groups of one number, which have no variance
    channels, groups = width
    x = cases.predictability_features(memory_format, images, channels, *grid, dtype=dtype, seed=seed, device=device)
    args = (x, *cases.predictability_parameters(channels, parameter_dtype, seed, device=device), groups, 1e-5)
    check_against_reference(OP, *args, backend="triton")


@case
@example(
    images=1, grid=(1, 1), width=(8, 4), memory_format="channels_first",
    dtype=torch.float32, parameter_dtype=torch.float32, seed=0,
)  # fmt: skip
@example(
    images=1, grid=(4, 4), width=(288, 8), memory_format="channels_last",
    dtype=torch.bfloat16, parameter_dtype=torch.float32, seed=0,
)  # fmt: skip
@example(
    images=1, grid=(4, 4), width=(288, 8), memory_format="channels_first",
    dtype=torch.bfloat16, parameter_dtype=torch.float32, seed=0,
)  # fmt: skip
def test_matches_the_definition(device: torch.device, **some: Any) -> None:
    check(**some, device=device)


@pytest.mark.usefixtures("small_tiles")
@case
def test_many_splits_and_blocks(device: torch.device, **some: Any) -> None:
    check(**some, device=device)


@pytest.mark.parametrize("memory_format", ["channels_first", "channels_last"])
def test_as_accurate_as_pytorch_over_many_inputs(memory_format: str, device: torch.device) -> None:
    """The error over many inputs averages luck out, so this check needs no absolute floor."""

    def arguments(seed: int) -> tuple[Any, ...]:
        x = cases.predictability_features(memory_format, 2, 24, 5, 5, seed=seed, device=device)
        return x, *cases.predictability_parameters(24, seed=seed, device=device), 8, 1e-5

    check_rms_against_reference(OP, arguments, backend="triton")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("memory_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("channels, groups", [(256, 64), (128, 128)])
def test_more_groups_than_one_program_can_sort(
    memory_format: str, channels: int, groups: int, device: torch.device
) -> None:
    x = cases.predictability_features(memory_format, 1, channels, 2, 2, device=device)
    check_against_reference(
        OP, x, *cases.predictability_parameters(channels, device=device), groups, 1e-5, backend="triton"
    )


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("memory_format", ["channels_first", "channels_last"])
def test_statistics_far_from_zero(memory_format: str, device: torch.device) -> None:
    """Computed from sums of squares, the variance of these features would be lost to rounding."""
    x = 3000 + cases.predictability_features(memory_format, 2, 16, 5, 5, device=device)
    _, stats = boundary._predictability(x.flatten(2), *cases.predictability_parameters(16, device=device), 4, 1e-5)
    groups = x.double().reshape(2, 4, -1)
    variance, mean = torch.var_mean(groups, dim=2, correction=0)
    torch.testing.assert_close(stats[:, 0].double(), mean, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
    torch.testing.assert_close(stats[:, 1].double(), (variance + 1e-5).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("memory_format", ["channels_first", "channels_last"])
def test_constant_features(memory_format: str, device: torch.device) -> None:
    x = torch.full_like(cases.predictability_features(memory_format, 2, 16, 3, 3, device=device), 0.3)
    check_against_reference(OP, x, *cases.predictability_parameters(16, device=device), 4, 1e-5, backend="triton")


@pytest.mark.parametrize("memory_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_corners_are_exactly_one_and_pass_nothing(memory_format: str, dtype: torch.dtype, device: torch.device) -> None:
    x = cases.predictability_features(memory_format, 2, 16, 3, 5, dtype=dtype, device=device).requires_grad_()
    leaves = [x, *(value.requires_grad_() for value in cases.predictability_parameters(16, device=device))]
    with ops.use_backend("triton"):
        p = OP(*leaves, 4, 1e-5)
    assert (p[:, [0, -1]] == 1).all() and (p[:, 1:-1] < 1).all()
    grad = randn(2, 15).to(device)
    wanted = torch.autograd.grad(p, leaves, grad, retain_graph=True)
    grad[:, [0, -1]] = float("nan")
    for actual, expected in zip(torch.autograd.grad(p, leaves, grad), wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", cases.MEMORY_FORMATS)
def test_gradient_keeps_the_memory_format(memory_format: str, device: torch.device) -> None:
    x = cases.predictability_features(memory_format, 2, 16, 3, 5, device=device)
    with ops.use_backend("triton"):
        _, (grad, *_) = differentiate(OP, (x, *cases.predictability_parameters(16, device=device), 4, 1e-5))
    memory = torch.channels_last if "channels_last" in memory_format else torch.contiguous_format
    assert grad.is_contiguous(memory_format=memory)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("memory_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_does_not_feel_its_batch(memory_format: str, dtype: torch.dtype, device: torch.device) -> None:
    x = cases.predictability_features(memory_format, 3, 16, 3, 5, dtype=dtype, device=device)
    x[1] = float("nan")
    cotangent = randn(3, 15, seed=3).to(device)

    def evaluate(rows: slice) -> tuple[Tensor, Tensor]:
        part = x[rows].detach().requires_grad_()
        with ops.use_backend("triton"):
            p = OP(part, *cases.predictability_parameters(16, device=device), 4, 1e-5)
        return p.detach(), torch.autograd.grad(p, part, cotangent[rows])[0]

    together = evaluate(slice(None))
    assert together[0][1, 1:-1].isnan().all(), "NaN must not turn into a probability"
    for image in (0, 2):
        rows = slice(image, image + 1)
        for batched, alone in zip(together, evaluate(rows), strict=True):
            torch.testing.assert_close(batched[rows], alone, rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("wanted", range(5))
def test_each_gradient_alone(memory_format: str, wanted: int, device: torch.device) -> None:
    x = cases.predictability_features(memory_format, 2, 16, 3, 5, device=device)
    inputs = [x, *cases.predictability_parameters(16, device=device)]
    with ops.use_backend("triton"):
        _, together = differentiate(OP, (*inputs, 4, 1e-5))
        _, (alone,) = differentiate(OP, (*inputs, 4, 1e-5), wanted=[wanted])
    torch.testing.assert_close(alone, together[wanted], rtol=0, atol=0)


def test_weight_of_a_convolution(device: torch.device) -> None:
    x = cases.predictability_features("channels_last", 2, 16, 3, 5, device=device)
    norm_weight, norm_bias, out_weight, out_bias = cases.predictability_parameters(16, device=device)
    with ops.use_backend("triton"):
        _, flat = differentiate(OP, (x, norm_weight, norm_bias, out_weight, out_bias, 4, 1e-5))
        args = (x, norm_weight, norm_bias, out_weight.view(1, 16, 1, 1), out_bias.view(1), 4, 1e-5)
        _, shaped = differentiate(OP, args)
    for i, (a, b) in enumerate(zip(shaped, flat, strict=True)):
        assert a.shape == args[i].shape
        torch.testing.assert_close(a.flatten(), b.flatten(), rtol=0, atol=0)


@pytest.mark.parametrize("strides", [(2**31 + 16, 6, 1), (2**31 + 16, 1, 8), (8, 2**29, 1), (8, 1, 2**29)])
def test_features_far_apart_in_memory(strides: tuple[int, int, int], device: torch.device) -> None:
    shape = (2, 8, 6)
    size = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    far = torch.empty(size, dtype=torch.float16, device=device).as_strided(shape, strides)
    if strides[0] == 8:  # these strides make the two images overlap, so the test takes one
        far = far[:1]
    far.copy_(randn(*far.shape, dtype=torch.float16).to(device))
    results = [
        boundary._predictability(x, *cases.predictability_parameters(8, device=device), 4, 1e-5)
        for x in (far, far.contiguous() if strides[2] == 1 else far.mT.contiguous().mT)
    ]
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_float64_is_refused(device: torch.device) -> None:
    x = torch.zeros(1, 8, 2, 2, dtype=torch.float64, device=device)
    with ops.use_backend("triton"), pytest.raises(TypeError, match="float64"):
        OP(x, *cases.predictability_parameters(8, device=device))


@pytest.mark.parametrize("memory_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(memory_format: str, dtype: torch.dtype, device: torch.device) -> None:
    x = cases.predictability_features(memory_format, 2, 16, 3, 5, dtype=dtype, device=device).flatten(2)
    values = cases.predictability_parameters(16, device=device)
    leaves = [value.detach().requires_grad_() for value in (x, *values)]
    torch.library.opcheck(boundary._predictability.op._opoverload, (*leaves, 4, 1e-5))
    p, stats = boundary._predictability(x, *values, 4, 1e-5)
    for need_features in (True, False):
        args = (randn(2, 15).to(device), x, *values[:3], p, stats, need_features)
        torch.library.opcheck(boundary._predictability_grad.op._opoverload, args)


@pytest.mark.parametrize("memory_format", ["channels_first", "channels_last"])
def test_compiles_without_a_graph_break(memory_format: str, device: torch.device) -> None:
    x = cases.predictability_features(memory_format, 2, 16, 3, 5, device=device)
    args = (x, *cases.predictability_parameters(16, device=device), 4, 1e-5)
    with ops.use_backend("triton"):
        eager = differentiate(OP, args)
        traced = differentiate(torch.compile(OP, fullgraph=True, backend="aot_eager"), args)
    for actual, wanted in zip(itertools.chain(*traced), itertools.chain(*eager), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
