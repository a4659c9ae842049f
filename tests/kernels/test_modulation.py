"""adaLN kernels: against the definition, bitwise independence of the batch, padding rows, and tracing."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import cases
from support.accuracy import assert_equal_but_rounding, check_against_reference, differentiate
from support.inputs import randn, random_cu_seqlens
from torch import Tensor

from dcdit import ops
from dcdit.kernels.launch import force_config
from dcdit.ops._triton import modulation
from dcdit.ops._triton.kernel_op import unit_stride

NORM, ADD, PAIR = ops.modulated_layer_norm, ops.gated_add, ops.gated_add_modulated_layer_norm
RMS = ops.modulated_rms_norm
AFFINE = [(NORM, "shift weight bias"), (RMS, "shift weight"), (RMS, "")]
OPS = [NORM, ADD, PAIR]
KERNEL_OPS = [modulation._norm, modulation._add, modulation._add_norm]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

lengths_strategy = st.one_of(
    st.lists(st.integers(0, 20), max_size=5),
    st.permutations([50, 1, 0, 2]),
)


def run(op: Callable[..., Any], *args: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    with ops.use_backend("triton"):
        return differentiate(op, args)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@given(
    lengths=lengths_strategy,
    width=st.sampled_from([8, 24, 72]),
    dtype=st.sampled_from(DTYPES),
    table_dtype=st.sampled_from(DTYPES),
    padding=st.sampled_from([0, 0, 3, 37]),
    seed=st.integers(0, 99),
)
@example(lengths=[], width=8, dtype=torch.float32, table_dtype=torch.float32, padding=5, seed=0)
@example(lengths=[0, 0], width=8, dtype=torch.float32, table_dtype=torch.float32, padding=0, seed=0)
@example(lengths=[3, 40, 1], width=24, dtype=torch.bfloat16, table_dtype=torch.float32, padding=20, seed=1)
def test_matches_the_definition(
    op: Callable[..., Any], lengths: list[int], width: int, dtype: torch.dtype, table_dtype: torch.dtype, padding: int,
    seed: int, device: torch.device,
) -> None:  # fmt: skip
    args = cases.modulation(op, lengths, width, dtype, table_dtype, padding, seed, device)
    check_against_reference(op, *args, backend="triton")


@pytest.mark.parametrize(("op", "parts"), AFFINE, ids=lambda value: getattr(value, "__name__", value))
@given(
    lengths=lengths_strategy,
    width=st.sampled_from([8, 24, 72]),
    dtype=st.sampled_from(DTYPES),
    table_dtype=st.sampled_from(DTYPES),
    padding=st.sampled_from([0, 0, 3, 37]),
    seed=st.integers(0, 99),
)
def test_norms_with_their_own_weights(
    op: Callable[..., Any], parts: str, lengths: list[int], width: int, dtype: torch.dtype, table_dtype: torch.dtype,
    padding: int, seed: int, device: torch.device,
) -> None:  # fmt: skip
    args = cases.affine_norm(op, lengths, width, dtype, table_dtype, padding, parts, seed, device)
    check_against_reference(op, *args, backend="triton")


def test_small_weights_are_exact(device: torch.device) -> None:
    for op in (NORM, RMS):
        x, shift, scale, *rest, weight = cases.affine_norm(op, (9, 2), 24, parts="weight", device=device)[:6]
        shift = None if shift is None else shift * 1e-6
        check_against_reference(op, x, shift, scale, *rest, weight * 1e-6, backend="triton")


@pytest.mark.parametrize("op", [NORM, RMS], ids=lambda op: op.__name__)
def test_a_norm_with_weights_is_one_graph(op: Callable[..., Any], device: torch.device) -> None:
    args = cases.affine_norm(op, [3, 0, 19], 24, padding=2, device=device)
    eager, eager_grads = run(op, *args)
    traced, traced_grads = run(torch.compile(op, fullgraph=True, backend="aot_eager"), *args)
    for actual, wanted in zip(traced + traced_grads, eager + eager_grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("whole", [False, True])
def test_registration_of_rms_norm(whole: bool, device: torch.device) -> None:
    x, shift, scale, cu_seqlens, eps, _ = cases.affine_norm(RMS, [3, 0, 19], 24, padding=2, device=device)
    args = x.requires_grad_(), shift if whole else None, scale.detach().requires_grad_(), cu_seqlens, eps, True, whole
    torch.library.opcheck(modulation._norm.op._opoverload, args)


@pytest.mark.parametrize("width", [1152, 2048])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_wide_rows(op: Callable[..., Any], width: int, device: torch.device) -> None:
    check_against_reference(op, *cases.modulation(op, [2, 3], width, torch.bfloat16, device=device), backend="triton")


def test_more_images_than_one_search_step(device: torch.device) -> None:
    lengths = [5 if i in (0, 255, 256, 299) else 0 for i in range(300)]
    args = cases.modulation(ADD, lengths, 8, padding=2, device=device)
    with ops.use_backend("triton"):
        actual = ADD(*args)
    with ops.use_backend("reference"):
        torch.testing.assert_close(actual, ADD(*args), rtol=1e-6, atol=1e-6)


def test_a_sequence_of_many_chunks(device: torch.device) -> None:
    args = cases.modulation(PAIR, [3, 75], 8, device=device)
    with force_config("modulation_sum", {"CHUNKS": 2, "BLOCK": 16, "num_warps": 1}):
        check_against_reference(PAIR, *args, backend="triton")


@pytest.mark.parametrize("op", [NORM, PAIR], ids=lambda op: op.__name__)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=2, max_size=3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@example(lengths=[7, 50, 33], dtype=torch.float32, seed=0)
def test_packed_equals_each_sequence_alone(
    op: Callable[..., Any], lengths: list[int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    args = cases.modulation(op, lengths, 8, dtype, dtype, 4, seed, device)
    rows = 1 if op is NORM else 2  # arguments that are tokens; the rest are modulation

    def evaluate(*some: Any) -> tuple[list[Tensor], list[Tensor | None]]:
        leaves = [a.detach().requires_grad_() for a in some if isinstance(a, Tensor) and a.is_floating_point()]
        with ops.use_backend("triton"):
            out = op(*leaves, *some[len(leaves) :])
        out = out if isinstance(out, tuple) else (out,)
        # A cotangent that depends on the rows alone, not on their position in the batch.
        grads = torch.autograd.grad(out, leaves, [o.detach() * (i + 1) for i, o in enumerate(out)])
        return [o.detach() for o in out], list(grads)

    packed, packed_grads = evaluate(*args)
    floats = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    starts = random_cu_seqlens(*lengths).tolist()
    for i, (lo, hi) in enumerate(itertools.pairwise(starts)):
        alone_args = [a[lo:hi] for a in floats[:rows]] + [a[i : i + 1] for a in floats[rows:]]
        cu_seqlens = torch.tensor([0, hi - lo], dtype=torch.int32, device=device)
        alone, alone_grads = evaluate(*alone_args, cu_seqlens, *args[len(floats) + 1 :])
        for actual, wanted in zip(packed, alone, strict=True):
            torch.testing.assert_close(actual[lo:hi], wanted, rtol=0, atol=0)
        for j, (actual, wanted) in enumerate(zip(packed_grads, alone_grads, strict=True)):
            part = actual[lo:hi] if j < rows else actual[i : i + 1]
            torch.testing.assert_close(part, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_garbage_in_padding_rows_stays_there(dtype: torch.dtype, device: torch.device) -> None:
    lengths, padding = [5, 0, 18], 20
    real = sum(lengths)
    clean = cases.modulation(PAIR, lengths, 24, dtype, dtype, padding, device=device)
    dirty = tuple(a.detach().clone() if i < 2 else a for i, a in enumerate(clean))
    dirty[1][real:] = float("nan")

    def evaluate(args: tuple[Any, ...], fill: float) -> list[Tensor]:
        leaves = [a.detach().requires_grad_() for a in args[:5]]
        with ops.use_backend("triton"):
            added, normed = PAIR(*leaves, *args[5:])
            again = NORM(added.detach(), leaves[3], leaves[4], *args[5:])
        cotangents = [randn(*added.shape, dtype=dtype, seed=i).to(device) for i in range(3)]
        for cotangent in cotangents:
            cotangent[real:] = fill
        grads = torch.autograd.grad([added, normed, again], leaves, cotangents)
        # A padding row of the sum is the row of x, so its gradient goes to x unchanged.
        torch.testing.assert_close(grads[0][real:], cotangents[0][real:], rtol=0, atol=0, equal_nan=True)
        return [added.detach(), normed.detach(), again.detach(), grads[0][:real], *grads[1:]]

    wanted, actual = evaluate(clean, 0.0), evaluate(dirty, float("nan"))
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    added, normed, again, _, grad_y, *_ = actual
    torch.testing.assert_close(added[real:], clean[0][real:], rtol=0, atol=0)
    for tensor in (normed, again, grad_y):
        assert not tensor[real:].any()


@given(lengths=lengths_strategy, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_fused_pair_is_the_two_operations(
    lengths: list[int], dtype: torch.dtype, seed: int, device: torch.device
) -> None:
    x, y, gate, shift, scale, cu_seqlens, eps = cases.modulation(PAIR, lengths, 40, dtype, dtype, 3, seed, device)
    with ops.use_backend("triton"):
        added, normed = PAIR(x, y, gate, shift, scale, cu_seqlens, eps)
        torch.testing.assert_close(added, ADD(x, y, gate, cu_seqlens), rtol=0, atol=0)
        # Two programs: compiled, they may add the columns of a row in different orders.
        assert_equal_but_rounding(normed, NORM(added, shift, scale, cu_seqlens, eps))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_each_gradient_alone(op: Callable[..., Any], device: torch.device) -> None:
    args = cases.modulation(op, [6, 20], 24, padding=3, device=device)
    floats = sum(isinstance(a, Tensor) and a.is_floating_point() for a in args)
    _, together = run(op, *args)
    for i in range(floats):
        with ops.use_backend("triton"):
            _, (alone,) = differentiate(op, args, wanted=[i])
        assert_equal_but_rounding(alone, together[i])


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_of_the_pair_unused(used: int, device: torch.device) -> None:
    def one(*args: Any) -> Tensor:
        return PAIR(*args)[used]

    one.__name__ = PAIR.__name__
    args = cases.modulation(PAIR, [6, 20], 24, padding=3, device=device)
    _, grads = run(one, *args)
    leaves = [a.detach().double().requires_grad_() for a in args[:5]]
    with ops.use_backend("reference"):
        out = PAIR(*leaves, *args[5:])[used]
    wanted = torch.autograd.grad(out, leaves, randn(*out.shape, seed=7).to(device).double(), allow_unused=True)
    for actual, exact in zip(grads, wanted, strict=True):
        assert (actual is None) == (exact is None)
        if exact is not None:
            torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


def test_one_modulation_row_for_all_images(device: torch.device) -> None:
    x, shift, scale, cu_seqlens, eps = cases.modulation(NORM, [4, 9, 2], 24, device=device)
    shared = [table[:1].expand(3, -1) for table in (shift, scale)]
    check_against_reference(NORM, x, *shared, cu_seqlens, eps, backend="triton")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_transposed_tokens(op: Callable[..., Any], device: torch.device) -> None:
    args = cases.modulation(op, [4, 9], 24, device=device)
    check_against_reference(op, args[0].t().contiguous().t(), *args[1:], backend="triton")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_float64_is_refused(op: Callable[..., Any]) -> None:
    args = cases.modulation(op, [4], 24)
    args = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    with ops.use_backend("triton"), pytest.raises(TypeError, match="float64"):
        op(*args)


@pytest.mark.parametrize(
    "kernel_op, op", list(zip(KERNEL_OPS, OPS, strict=True)), ids=lambda op: getattr(op, "__name__", "")
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(kernel_op: Any, op: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> None:
    args = cases.modulation(op, [3, 0, 19], 24, dtype, padding=2, device=device)
    args = tuple(a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    kind = (False, False) if op is NORM else ()
    torch.library.opcheck(kernel_op.op._opoverload, (*args, *kind))


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
def test_registration_of_the_backward(wanted: tuple[bool, bool, bool], device: torch.device) -> None:
    x, y, gate, shift, scale, cu_seqlens, eps = cases.modulation(PAIR, [3, 0, 19], 24, padding=2, device=device)
    added, _, stats = modulation._add_norm(*map(unit_stride, (x, y, gate, shift, scale, cu_seqlens)), eps)
    grads = (randn(24, 24, seed=seed).to(device) for seed in (8, 9))
    args = (*grads, added, unit_stride(y), gate, scale, stats, cu_seqlens, *wanted, False, False)
    torch.library.opcheck(modulation._backward.op._opoverload, args)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_compiles_without_a_graph_break(op: Callable[..., Any], device: torch.device) -> None:
    args = cases.modulation(op, [3, 0, 19], 24, padding=2, device=device)
    eager, eager_grads = run(op, *args)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    traced, traced_grads = run(compiled, *args)
    for actual, wanted in zip(traced + traced_grads, eager + eager_grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
