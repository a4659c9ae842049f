"""Group norm and SiLU: against the definition, layouts, splits, large means, batches, single gradients, and tracing."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import cases
from support.accuracy import (
    assert_equal_but_rounding,
    check_against_reference,
    check_rms_against_reference,
    differentiate,
)
from support.inputs import randn
from torch import Tensor

from dcdit import ops
from dcdit.kernels import group_norm, launch
from dcdit.ops._triton import group_norm as registered

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["tokens", *cases.MEMORY_FORMATS]
OP = ops.group_norm_silu


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few positions then make several tiles, splits and blocks of channels."""
    config = {"TILE": 32, "BLOCK_C": 8, "num_warps": 1}
    monkeypatch.setattr(launch, "config_for", lambda *_, **__: config)
    monkeypatch.setattr(group_norm, "MIN_POSITIONS", 8)
    monkeypatch.setattr(group_norm, "MAX_SPLITS", 3)


case = given(
    images=st.integers(0, 2),
    grid=st.tuples(st.integers(0, 5), st.integers(1, 6)),
    width=st.sampled_from([(8, 4), (16, 4), (24, 8), (36, 3), (40, 1), (28, 4)]),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    parameter_dtype=st.sampled_from(DTYPES),
    shifted=st.booleans(),
    seed=st.integers(0, 99),
)


def check(
    images: int, grid: tuple[int, int], width: tuple[int, int], layout: str, dtype: torch.dtype,
    parameter_dtype: torch.dtype, shifted: bool, seed: int, device: torch.device,
) -> None:  # fmt: skip
    channels, groups = width
    args = cases.group_norm_silu(
        layout, images, channels, *grid, groups=groups, dtype=dtype, parameter_dtype=parameter_dtype,
        shifted=shifted, seed=seed, device=device,
    )  # fmt: skip
    check_against_reference(OP, *args, backend="triton")


WIDE = {"images": 1, "grid": (2, 3), "width": (1152, 32), "seed": 0, "shifted": True}
NARROW = {"images": 2, "grid": (3, 5), "width": (96, 32), "seed": 0, "shifted": True}


@case
@example(**WIDE, layout="channels_last", dtype=torch.bfloat16, parameter_dtype=torch.float32)
@example(**NARROW, layout="tokens", dtype=torch.bfloat16, parameter_dtype=torch.bfloat16)
@example(**NARROW, layout="channels_last", dtype=torch.float32, parameter_dtype=torch.float32)
def test_matches_the_definition(device: torch.device, **some: Any) -> None:
    check(**some, device=device)


@pytest.mark.usefixtures("small_tiles")
@case
def test_many_splits_and_blocks(device: torch.device, **some: Any) -> None:
    check(**some, device=device)


def test_as_accurate_as_pytorch_over_many_inputs(device: torch.device) -> None:
    """The error over many inputs averages luck out, so this check needs no absolute floor."""

    def arguments(seed: int) -> tuple[Any, ...]:
        return cases.group_norm_silu("tokens", 2, 24, 5, 5, groups=8, seed=seed, device=device)

    check_rms_against_reference(OP, arguments, seeds=8, backend="triton")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("shifted", [False, True])
def test_statistics_far_from_zero(shifted: bool, device: torch.device) -> None:
    """Computed from sums of squares, the variance would be lost to rounding."""
    x, groups, weight, bias, shift, eps = cases.group_norm_silu(
        "tokens", 2, 16, 5, 5, groups=4, shifted=shifted, mean=3000.0, device=device
    )
    _, stats = registered._forward(x, groups, weight, bias, shift, eps)
    moved = x.double() if shift is None else x.double() + shift.double()[:, None]
    variance, mean = torch.var_mean(moved.unflatten(2, (groups, -1)), dim=(1, 3), correction=0)
    centre = mean.repeat_interleave(4, 1) - (0 if shift is None else shift.double())
    rstd = (variance + eps).rsqrt().repeat_interleave(4, 1)
    torch.testing.assert_close(stats[:, 0].double(), centre, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
    torch.testing.assert_close(stats[:, 1].double(), rstd, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("small_tiles")
def test_a_first_tile_unlike_the_rest(device: torch.device) -> None:
    """Its mean is subtracted from all tiles of its split, and here it is far from theirs."""
    args = cases.group_norm_silu("tokens", 1, 16, 6, 6, groups=4, device=device)
    args[0][:, :4] += 1000.0
    check_against_reference(OP, *args, backend="triton")


def test_constant_images(device: torch.device) -> None:
    x, *rest = cases.group_norm_silu("tokens", 2, 16, 3, 3, groups=4, shifted=False, device=device)
    check_against_reference(OP, torch.full_like(x, 0.3), *rest, backend="triton")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_does_not_feel_its_batch(dtype: torch.dtype, device: torch.device) -> None:
    x, groups, weight, bias, shift, eps = cases.group_norm_silu(
        "tokens", 3, 16, 5, 5, groups=4, dtype=dtype, device=device
    )
    x[1] = float("nan")
    cotangent = randn(*x.shape, dtype=dtype, seed=3).to(device)

    def evaluate(rows: slice) -> tuple[Tensor, ...]:
        leaves = [value[rows].detach().requires_grad_() for value in (x, shift)]
        with ops.use_backend("triton"):
            y = OP(leaves[0], groups, weight, bias, leaves[1], eps)
        return y.detach(), *torch.autograd.grad(y, leaves, cotangent[rows])

    together = evaluate(slice(None))
    assert together[0][1].isnan().all()
    for image in (0, 2):
        rows = slice(image, image + 1)
        for batched, alone in zip(together, evaluate(rows), strict=True):
            assert torch.equal(batched[rows], alone)


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone(wanted: int, device: torch.device) -> None:
    x, groups, *rest = cases.group_norm_silu("channels_last", 2, 16, 3, 5, groups=4, device=device)
    number = [0, 2, 3, 4][wanted]
    with ops.use_backend("triton"):
        _, together = differentiate(OP, (x, groups, *rest))
        _, (alone,) = differentiate(OP, (x, groups, *rest), wanted=[number])
    assert_equal_but_rounding(alone, together[wanted])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_have_their_channels_side_by_side(layout: str, device: torch.device) -> None:
    args = cases.group_norm_silu(layout, 2, 16, 3, 5, groups=4, device=device)
    with ops.use_backend("triton"):
        (y,), (grad, *_) = differentiate(OP, args)
    memory = torch.contiguous_format if layout == "tokens" else torch.channels_last
    assert y.is_contiguous(memory_format=memory)
    assert grad.shape == args[0].shape


@pytest.mark.parametrize("strides", [(2**31 + 16, 16, 1), (8, 2**29, 1)])
def test_images_far_apart_in_memory(strides: tuple[int, int, int], device: torch.device) -> None:
    shape = (2, 6, 8) if strides[1] == 16 else (1, 6, 8)
    size = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    far = torch.empty(size, dtype=torch.float16, device=device).as_strided(shape, strides)
    far.copy_(randn(*shape, dtype=torch.float16).to(device))
    _, groups, *rest = cases.group_norm_silu("tokens", shape[0], 8, 2, 3, groups=4, device=device)
    with ops.use_backend("triton"):
        results = [differentiate(OP, (x, groups, *rest)) for x in (far, far.contiguous())]
    for actual, wanted in zip(itertools.chain(*results[0]), itertools.chain(*results[1]), strict=True):
        assert_equal_but_rounding(actual, wanted)


def test_float64_is_refused(device: torch.device) -> None:
    x, *rest = cases.group_norm_silu("tokens", 1, 8, 2, 2, groups=4, device=device)
    with ops.use_backend("triton"), pytest.raises(TypeError, match="float64"):
        OP(x.double(), *rest)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype: torch.dtype, shifted: bool, device: torch.device) -> None:
    args = cases.group_norm_silu("tokens", 2, 16, 3, 5, groups=4, dtype=dtype, shifted=shifted, device=device)
    leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    torch.library.opcheck(registered._forward.op._opoverload, tuple(leaves))
    x, groups, weight, bias, _, _ = args
    _, stats = registered._forward(*args)
    for shift_dtype, need_x in ((dtype if shifted else None, True), (None, False)):
        backward = (randn(*x.shape, dtype=dtype).to(device), x, groups, weight, bias, stats, shift_dtype, need_x)
        torch.library.opcheck(registered._gradients.op._opoverload, backward)


@pytest.mark.parametrize("layout", ["tokens", "channels_last", "channels_first"])
def test_compiles_without_a_graph_break(layout: str, device: torch.device) -> None:
    args = cases.group_norm_silu(layout, 2, 16, 3, 5, groups=4, device=device)
    with ops.use_backend("triton"):
        eager = differentiate(OP, args)
        traced = differentiate(torch.compile(OP, fullgraph=True, backend="aot_eager"), args)
    for actual, wanted in zip(itertools.chain(*traced), itertools.chain(*eager), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
