"""Cosine boundary of sequences: against the definition, sequence starts, clamping, addresses, and tracing."""

import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import cases
from support.accuracy import check_against_reference, differentiate
from support.inputs import randn, random_cu_seqlens
from torch import Tensor

from dcdit import ops
from dcdit.ops._triton import boundary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OP = ops.boundary_prob_cosine


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 40), st.sampled_from([8, 24, 72])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@example(shape=(1, 1, 8), dtype=torch.float32, seed=0)
@example(shape=(2, 5, 1152), dtype=torch.bfloat16, seed=0)
@example(shape=(1, 3, 2048), dtype=torch.float16, seed=0)
def test_grid_batches(shape: tuple[int, int, int], dtype: torch.dtype, seed: int, device: torch.device) -> None:
    check_against_reference(
        OP, *cases.boundary_prob_cosine(*shape, dtype=dtype, seed=seed, device=device), backend="triton"
    )


@given(
    lengths=st.one_of(st.lists(st.integers(0, 9), max_size=12), st.permutations([60, 1, 0, 0, 2, 1])),
    width=st.sampled_from([8, 24, 72]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@example(lengths=[], width=8, dtype=torch.float32, seed=0)
@example(lengths=[0, 0], width=8, dtype=torch.float32, seed=0)
@example(lengths=[0, 0, 40, 0], width=24, dtype=torch.bfloat16, seed=0)
@example(lengths=[1] * 33, width=8, dtype=torch.float32, seed=0)
def test_packed_sequences(lengths: list[int], width: int, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    q, k = cases.boundary_prob_cosine(sum(lengths), width, dtype=dtype, seed=seed, device=device)
    check_against_reference(OP, q, k, random_cu_seqlens(*lengths).to(device), backend="triton")


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_packed_equals_each_sequence_alone(
    lengths: list[int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    q, k = cases.boundary_prob_cosine(sum(lengths), 24, dtype=dtype, seed=seed, device=device)
    cu_seqlens = random_cu_seqlens(*lengths).to(device)
    cotangent = randn(sum(lengths), seed=3).to(device)

    def evaluate(rows: slice, starts: Tensor) -> tuple[Tensor, ...]:
        leaves = [x[rows].detach().requires_grad_() for x in (q, k)]
        with ops.use_backend("triton"):
            p = OP(*leaves, starts)
        return p.detach(), *torch.autograd.grad(p, leaves, cotangent[rows])

    packed = evaluate(slice(None), cu_seqlens)
    for lo, hi in itertools.pairwise(cu_seqlens.tolist()):
        # Packed too: for a grid batch another kernel is compiled, which may round differently.
        only = random_cu_seqlens(hi - lo).to(device)
        for together, alone in zip(packed, evaluate(slice(lo, hi), only), strict=True):
            torch.testing.assert_close(together[lo:hi], alone, rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_garbage_stays_in_its_sequence(packed: bool, device: torch.device) -> None:
    # Copies with equal strides: other strides compile another kernel, which may round differently.
    clean, (q, k) = ([x.clone() for x in cases.boundary_prob_cosine(2, 6, 24, device=device)] for _ in range(2))
    q[0, 3:], k[0, 3:] = float("nan"), float("inf")

    def evaluate(q: Tensor, k: Tensor) -> list[Tensor]:
        args = (q.flatten(0, 1), k.flatten(0, 1), random_cu_seqlens(6, 6).to(device)) if packed else (q, k)
        with ops.use_backend("triton"):
            outputs, grads = differentiate(OP, args)
        return [x.reshape(2, 6, -1) for x in outputs + grads]

    p, dq, dk = evaluate(q, k)
    assert p[0, 4:].isnan().all(), "NaN must not turn into a probability"
    for dirty, wanted in zip((p, dq, dk), evaluate(*clean), strict=True):
        torch.testing.assert_close(dirty[1], wanted[1], rtol=0, atol=0)


def test_starts_are_exactly_one_and_pass_nothing(device: torch.device) -> None:
    q, k = cases.boundary_prob_cosine(12, 24, device=device)
    cu_seqlens = random_cu_seqlens(4, 0, 1, 7).to(device)
    with ops.use_backend("triton"):
        (p,), (dq, dk) = differentiate(OP, (q, k, cu_seqlens))
    starts, ends = [0, 4, 5], [3, 4, 11]
    assert (p[starts] == 1).all()
    assert not dk[starts].any() and not dq[ends].any()


@pytest.mark.parametrize("scale", [0.0, 1e-14, 1e-4, 1e4])
def test_short_and_long_vectors(scale: float, device: torch.device) -> None:
    q, k = cases.boundary_prob_cosine(2, 6, 24, device=device)
    check_against_reference(OP, q * scale, k, backend="triton")
    check_against_reference(OP, q, k * scale, backend="triton")


def test_transposed_input(device: torch.device) -> None:
    q, k = (randn(24, 7, seed=i).to(device).t()[None] for i in range(2))
    check_against_reference(OP, q, k, backend="triton")


@pytest.mark.parametrize("wanted", [0, 1])
def test_each_gradient_alone(wanted: int, device: torch.device) -> None:
    inputs = cases.boundary_prob_cosine(2, 6, 24, device=device)
    with ops.use_backend("triton"):
        _, together = differentiate(OP, inputs)
        _, (alone,) = differentiate(OP, inputs, wanted=[wanted])
    torch.testing.assert_close(alone, together[wanted], rtol=0, atol=0)


def test_rows_far_apart_in_memory(device: torch.device) -> None:
    stride = 2**30 + 8
    far = torch.empty(2 * stride + 8, dtype=torch.float16, device=device).as_strided((3, 8), (stride, 1))
    near = randn(3, 8, dtype=torch.float16).to(device)
    far.copy_(near)
    other = randn(3, 8, dtype=torch.float16, seed=1).to(device)
    for i in range(2):
        args = [[other, other], [other, other]]
        args[0][i], args[1][i] = far, near
        with ops.use_backend("triton"):
            results = [itertools.chain(*differentiate(OP, tuple(x[None] for x in pair))) for pair in args]
        for actual, wanted in zip(*results, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_float64_is_refused(device: torch.device) -> None:
    q = torch.zeros(1, 2, 8, dtype=torch.float64, device=device)
    with ops.use_backend("triton"), pytest.raises(TypeError, match="float64"):
        OP(q, q)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(packed: bool, dtype: torch.dtype, device: torch.device) -> None:
    q, k = (x.detach().requires_grad_() for x in cases.boundary_prob_cosine(6, 24, dtype=dtype, seed=0, device=device))
    starts = random_cu_seqlens(2, 4).to(device) if packed else None
    torch.library.opcheck(boundary._cosine.op._opoverload, (q, k, starts, 3))
    grad = randn(6).to(device)
    for needs in ((True, True), (True, False), (False, True)):
        args = (grad, q.detach(), k.detach(), starts, 3, *needs)
        torch.library.opcheck(boundary._cosine_grad.op._opoverload, args)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_graph_break(packed: bool, device: torch.device) -> None:
    args = cases.boundary_prob_cosine(2, 6, 24, device=device)
    if packed:
        args = (*(x.flatten(0, 1) for x in args), random_cu_seqlens(5, 7).to(device))
    with ops.use_backend("triton"):
        eager = differentiate(OP, args)
        traced = differentiate(torch.compile(OP, fullgraph=True, backend="aot_eager"), args)
    for actual, wanted in zip(itertools.chain(*traced), itertools.chain(*eager), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
