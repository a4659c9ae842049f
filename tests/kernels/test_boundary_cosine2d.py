"""Cosine boundary on a grid: against the definition, clamping, partial sums of the weight, addresses, and tracing."""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import cases
from support.accuracy import assert_equal_but_rounding, check_against_reference, differentiate
from support.inputs import randn
from torch import Tensor

from dcdit import ops
from dcdit.kernels import boundary_cosine2d
from dcdit.ops._triton import boundary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OP = ops.boundary_prob_cosine2d


@given(
    images=st.integers(0, 3),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    width=st.sampled_from([8, 24, 72]),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 0.3, 5.0]),
    seed=st.integers(0, 99),
)
@example(
    images=2, grid=(1, 1), width=8, dtype=torch.float32, weight_dtype=torch.float32, spread=0.3, seed=0
)  # fmt: skip
@example(
    images=1, grid=(2, 3), width=1152, dtype=torch.bfloat16, weight_dtype=torch.float32, spread=0.0, seed=0
)  # fmt: skip
def test_matches_the_definition(
    images: int, grid: tuple[int, int], width: int, dtype: torch.dtype, weight_dtype: torch.dtype, spread: float,
    seed: int, device: torch.device,
) -> None:  # fmt: skip
    args = cases.boundary_prob_cosine2d(images, grid, width, dtype, weight_dtype, spread, seed, device=device)
    check_against_reference(OP, *args, backend="triton")


def test_widest_rows(device: torch.device) -> None:
    check_against_reference(
        OP, *cases.boundary_prob_cosine2d(1, (2, 2), 2048, torch.float16, device=device), backend="triton"
    )


def test_both_ends_of_the_clamp_are_reached(device: torch.device) -> None:
    """The random tests above rely on this."""
    with ops.use_backend("triton"):
        p = OP(*cases.boundary_prob_cosine2d(2, (6, 6), 24, spread=5.0, device=device))
    assert (p == 0).any() and (p == 1).any() and ((p > 0) & (p < 1)).any()


@pytest.mark.parametrize("splits", [1, 2, 128])
def test_several_tiles_share_a_partial_sum(splits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boundary_cosine2d, "MAX_SPLITS", splits)
    check_against_reference(OP, *cases.boundary_prob_cosine2d(2, (7, 5), 24, device=device), backend="triton")


@pytest.mark.parametrize("grid", [(1, 5), (3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_does_not_feel_its_batch(grid: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    images = 3
    q, k, weight, grid = cases.boundary_prob_cosine2d(images, grid, 24, dtype, device=device)
    cotangent = randn(*q.shape[:2], seed=3).to(device)

    def evaluate(rows: slice) -> tuple[Tensor, ...]:
        leaves = [x[rows].detach().requires_grad_() for x in (q, k)]
        with ops.use_backend("triton"):
            p = OP(*leaves, weight, grid)
        return p.detach(), *torch.autograd.grad(p, leaves, cotangent[rows])

    together = evaluate(slice(None))
    for image in range(images):
        rows = slice(image, image + 1)
        for batched, alone in zip(together, evaluate(rows), strict=True):
            torch.testing.assert_close(batched[rows], alone, rtol=0, atol=0)


def test_garbage_stays_in_its_image(device: torch.device) -> None:
    *inputs, weight, grid = cases.boundary_prob_cosine2d(3, (3, 4), 24, device=device)
    # Copies with equal strides: other strides compile another kernel, which may round differently.
    clean, dirty = ([x.clone() for x in inputs] for _ in range(2))
    dirty[0][1], dirty[1][1] = float("nan"), float("inf")
    with ops.use_backend("triton"):
        wanted, wanted_grads = differentiate(OP, (*clean, weight, grid))
        actual, actual_grads = differentiate(OP, (*dirty, weight, grid))
    assert actual[0][1].isnan().all(), "NaN must not turn into a probability"
    for a, b in zip(actual + actual_grads[:2], wanted + wanted_grads[:2], strict=True):
        torch.testing.assert_close(a[::2], b[::2], rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-14, 1e-4, 1e4])
def test_short_and_long_vectors(scale: float, device: torch.device) -> None:
    q, k, weight, grid = cases.boundary_prob_cosine2d(2, (3, 4), 24, device=device)
    one_row = torch.ones(12, 1, device=device).index_fill(0, torch.tensor([5], device=device), scale)
    check_against_reference(OP, q * one_row, k, weight, grid, backend="triton")
    check_against_reference(OP, q, k * one_row, weight, grid, backend="triton")


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_each_gradient_alone(wanted: int, device: torch.device) -> None:
    inputs = cases.boundary_prob_cosine2d(2, (3, 4), 24, device=device)
    with ops.use_backend("triton"):
        _, together = differentiate(OP, inputs)
        _, (alone,) = differentiate(OP, inputs, wanted=[wanted])
    assert_equal_but_rounding(alone, together[wanted])


def test_transposed_input(device: torch.device) -> None:
    q, k = (randn(24, 6, seed=i).to(device).t()[None] for i in range(2))
    weight = randn(3, 3, 24, seed=2).to(device).permute(2, 0, 1)
    check_against_reference(OP, q, k, weight, (2, 3), backend="triton")


def test_rows_far_apart_in_memory(device: torch.device) -> None:
    stride = 2**30 + 8
    far = torch.empty(3 * stride + 8, dtype=torch.float16, device=device).as_strided((4, 8), (stride, 1))
    near = randn(4, 8, dtype=torch.float16).to(device)
    far.copy_(near)
    other, weight = randn(4, 8, dtype=torch.float16, seed=1).to(device), randn(8, 3, 3, seed=2).to(device)
    for i in range(2):
        args = [[other, other], [other, other]]
        args[0][i], args[1][i] = far, near
        with ops.use_backend("triton"):
            results = [itertools.chain(*differentiate(OP, (*(x[None] for x in pair), weight, (2, 2)))) for pair in args]
        for actual, wanted in zip(*results, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_float64_is_refused(device: torch.device) -> None:
    q = torch.zeros(1, 2, 8, dtype=torch.float64, device=device)
    with ops.use_backend("triton"), pytest.raises(TypeError, match="float64"):
        OP(q, q, torch.zeros(8, 3, 3, device=device), (1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(dtype: torch.dtype, device: torch.device) -> None:
    q, k, weight, _ = cases.boundary_prob_cosine2d(1, (2, 3), 24, dtype, device=device)
    taps = weight.reshape(24, 9).t().contiguous()
    leaves = [x.detach().requires_grad_() for x in (q[0], k[0], taps)]
    torch.library.opcheck(boundary._cosine2d.op._opoverload, (*leaves, 2, 3))
    _, stats = boundary._cosine2d(q[0], k[0], taps, 2, 3)
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        args = (randn(6).to(device), q[0], k[0], taps, stats, 2, 3, *needs)
        torch.library.opcheck(boundary._cosine2d_grad.op._opoverload, args)


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    args = cases.boundary_prob_cosine2d(2, (3, 4), 24, device=device)
    with ops.use_backend("triton"):
        eager = differentiate(OP, args)
        traced = differentiate(torch.compile(OP, fullgraph=True, backend="aot_eager"), args)
    for actual, wanted in zip(itertools.chain(*traced), itertools.chain(*eager), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
