"""EMA de-chunking kernels: against the definition, chunk seams, independence of the batch, padding, and tracing."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import cases
from support.accuracy import (
    assert_close_to_reference,
    check_against_reference,
    check_rms_against_reference,
    cotangent,
    differentiate,
)
from support.inputs import packed_selection, randn, random_cu_seqlens, random_selection
from torch import Tensor

from dcdit import ops
from dcdit.kernels.launch import force_config
from dcdit.ops import TokenSelection, dechunk_ema, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = ["random", "ties", "one", "none", "all", "extreme"]
SMALL = {
    "dechunk_ema": {"CHUNK": 8, "BLOCK_D": 8, "num_warps": 1},
    "dechunk_ema_bwd": {"BLOCK_D": 8, "num_warps": 1},
    "dechunk_ema_carry": {"CHUNKS": 2, "BLOCK_D": 8, "num_warps": 1},
}


@pytest.fixture(autouse=True)
def small_chunks() -> Iterator[ExitStack]:
    """Several chunks within few positions; the interpreter's scan takes as long as it has elements."""
    with ExitStack() as stack:
        for kernel, config in SMALL.items():
            stack.enter_context(force_config(kernel, config))
        yield stack


def check(*args: Any) -> None:
    """Output and gradients against the definition; those of p and the gate are sums of terms that cancel."""
    of_p, of_gate = magnitudes(*args[:3])
    check_against_reference(dechunk_ema, *args, backend="triton", terms={"p": of_p, "gate": of_gate})


def magnitudes(h: Tensor, p: Tensor, sel: TokenSelection) -> tuple[float, float]:
    """The largest gradients of p and the gate, if all their terms had one sign."""
    if p.numel() == 0:
        return 0.0, 0.0
    given = (h, p)
    h, p = h.nan_to_num().double().abs().requires_grad_(), p.double()
    gate = torch.ones_like(p).requires_grad_()
    held = reference.dechunk_ema(h, p, sel, gate)
    grad_h, grad_gate = torch.autograd.grad(held, (h, gate), cotangent(held, given).abs())
    kept = sel.packed_rows >= 0
    packed_row, q = sel.packed_rows[kept].long(), p[kept].clamp(1e-4, 1 - 1e-4)[:, None]
    own = h.detach()[packed_row]
    before = (held.detach()[kept] - q * own) / (1 - q)
    grad_p = (grad_h[packed_row] / q * (own + before)).sum(1)
    return float(grad_p.max()), float(grad_gate.max())


def run(op: Callable[..., Any], *args: Any) -> list[Tensor | None]:
    with ops.use_backend("triton"):
        outputs, grads = differentiate(op, args)
    return [*outputs, *grads]


def assert_same(actual: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


variants = {
    "pattern": st.sampled_from(PATTERNS),
    "dtype": st.sampled_from(DTYPES),
    "gate": st.booleans(),
    "residual": st.booleans(),
    "seed": st.integers(0, 99),
}


@given(images=st.integers(0, 2), length=st.integers(1, 20), width=st.sampled_from([8, 16]), **variants)
@example(images=1, length=40, width=8, pattern="random", dtype=torch.float32, gate=True, residual=True, seed=0)
def test_grid_source_matches_the_definition(
    images: int, length: int, width: int, pattern: str, dtype: torch.dtype, gate: bool, residual: bool, seed: int,
    device: torch.device,
) -> None:  # fmt: skip
    case = random_selection(images, length, pattern=pattern, seed=seed)
    args = cases.dechunk_ema(*case, width, dtype, gate, residual, seed, device)
    check(*args)


@given(lengths=st.lists(st.integers(0, 12), max_size=4), **variants)
@example(lengths=[1, 45, 0, 2], pattern="all", dtype=torch.float32, gate=True, residual=True, seed=0)
@example(lengths=[0, 0], pattern="all", dtype=torch.float32, gate=True, residual=True, seed=0)
def test_packed_source_matches_the_definition(
    lengths: list[int], pattern: str, dtype: torch.dtype, gate: bool, residual: bool, seed: int, device: torch.device
) -> None:
    args = cases.dechunk_ema(
        *packed_selection(*lengths, pattern=pattern, seed=seed), 8, dtype, gate, residual, seed, device
    )
    check(*args)


def test_gradients_of_p_and_gate_are_as_accurate_as_pytorch(device: torch.device) -> None:
    """Chance averages out over many inputs, so the tolerance needs no minimum."""
    check_rms_against_reference(
        dechunk_ema,
        lambda seed: cases.dechunk_ema(*random_selection(1, 20, seed=seed), residual=False, seed=seed, device=device),
        backend="triton",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capacity", [12, 90])
def test_padding_rows_are_ignored(capacity: int, dtype: torch.dtype, device: torch.device) -> None:
    args = cases.dechunk_ema(*random_selection(2, 15, capacity=capacity), 8, dtype, device=device)
    check(*args)
    padding = int(args[2].cu_seqlens[-1])
    assert padding < capacity
    assert not run(dechunk_ema, *args)[1][padding:].any()


def test_budget_keeps_tokens_of_zero_probability(device: torch.device) -> None:
    args = cases.dechunk_ema(*random_selection(2, 15, pattern="extreme", budget=12), device=device)
    check(*args)


def test_gradient_of_p_includes_the_ends_of_the_clamp(device: torch.device) -> None:
    case = random_selection(1, 6, budget=6)
    p = torch.tensor([[1e-4, 1 - 1e-4, 0.5, 0.0, 1.0, 0.7]])
    args = cases.dechunk_ema(p, case[1], device=device)
    grad_p = run(dechunk_ema, *args)[2]
    with ops.use_backend("reference"):
        wanted = differentiate(dechunk_ema, args)[1][1]
    assert wanted.ne(0).tolist() == [[True, True, True, False, False, True]]
    torch.testing.assert_close(grad_p, wanted, rtol=1e-5, atol=1e-6)


def test_shipped_configuration(small_chunks: ExitStack, device: torch.device) -> None:
    small_chunks.close()
    args = cases.dechunk_ema(*packed_selection(1, 67), 24, torch.bfloat16, device=device)
    check(*args)


def test_wide_rows(small_chunks: ExitStack, device: torch.device) -> None:
    small_chunks.close()
    args = cases.dechunk_ema(*random_selection(1, 5), 2048, torch.float16, device=device)
    check(*args)


def test_sequences_of_65536(device: torch.device) -> None:
    """One long sequence among short ones, cut into chunks whose states are carried. Few tokens are kept."""
    p, sel = packed_selection(3, 65_536, 2)
    h, p, sel, *_ = cases.dechunk_ema(p, sel, gate=False, residual=False, device=device)
    with force_config("dechunk_ema", {"CHUNK": 1024, "BLOCK_D": 8, "num_warps": 4}):
        results = [evaluate_h(backend, h, p, sel) for backend in ("triton", "torch")]
    exact = evaluate_h("torch", h.double(), p.double(), sel)
    for found, same, wanted in zip(*results, exact, strict=True):
        assert_close_to_reference(found, wanted, same)


def evaluate_h(backend: str, h: Tensor, p: Tensor, sel: TokenSelection) -> tuple[Tensor, Tensor]:
    """Output and the gradient of h alone."""
    h = h.detach().requires_grad_()
    with ops.use_backend(backend):
        out = dechunk_ema(h, p, sel)
    return out.detach(), torch.autograd.grad(out, h, randn(*out.shape, seed=7).to(out))[0]


@given(lengths=st.lists(st.integers(0, 12), min_size=2, max_size=2), dtype=st.sampled_from(DTYPES))
@example(lengths=[3, 35, 9], dtype=torch.float32)
def test_packed_equals_each_sequence_alone(lengths: list[int], dtype: torch.dtype, device: torch.device) -> None:
    case = packed_selection(*lengths)
    h, p, sel, gate, residual = cases.dechunk_ema(*case, 8, dtype, device=device)

    def evaluate(*args: Any) -> list[Tensor]:
        leaves = [args[i].detach().requires_grad_() for i in (0, 1, 3, 4)]
        with ops.use_backend("triton"):
            out = dechunk_ema(leaves[0], leaves[1], args[2], *leaves[2:])
        # A cotangent that depends on the rows alone, not on where they sit.
        return [out.detach(), *torch.autograd.grad(out, leaves, out.detach() * 0.5)]

    together = evaluate(h, p, sel, gate, residual)
    starts, token_starts = random_cu_seqlens(*lengths).tolist(), sel.cu_seqlens.tolist()
    for (lo, hi), (first, last) in zip(itertools.pairwise(starts), itertools.pairwise(token_starts), strict=True):
        with ops.use_backend("reference"):
            own = ops.select_tokens(p[lo:hi], torch.tensor([0, hi - lo], dtype=torch.int32, device=device))
        assert own.indices.shape[0] == last - first
        alone = evaluate(h[first:last], p[lo:hi], own, gate[lo:hi], residual[lo:hi])
        out, grad_h, grad_p, grad_gate, grad_residual = together
        cut = [out[lo:hi], grad_h[first:last], grad_p[lo:hi], grad_gate[lo:hi], grad_residual[lo:hi]]
        assert_same(cut, alone)


def test_grid_equals_packed(device: torch.device) -> None:
    h, p, sel, gate, residual = cases.dechunk_ema(*random_selection(2, 19), device=device)
    flat = sel._replace(
        source_cu_seqlens=random_cu_seqlens(19, 19).to(device),
        mask=sel.mask.flatten(),
        natural_mask=sel.natural_mask.flatten(),
        packed_rows=sel.packed_rows.flatten(),
    )
    grid = run(dechunk_ema, h, p, sel, gate, residual)
    packed = run(dechunk_ema, h, p.flatten(), flat, gate.flatten(), residual.flatten(0, 1))
    assert_same([a.reshape(b.shape) for a, b in zip(grid, packed, strict=True)], packed)


@pytest.mark.parametrize("wanted", [0, 1, 3, 4])
def test_each_gradient_alone(wanted: int, device: torch.device) -> None:
    args = cases.dechunk_ema(*random_selection(2, 19), device=device)
    together = dict(zip((0, 1, 3, 4), run(dechunk_ema, *args)[1:], strict=True))
    with ops.use_backend("triton"):
        _, (alone,) = differentiate(dechunk_ema, args, wanted=[wanted])
    torch.testing.assert_close(alone, together[wanted], rtol=0, atol=0)


def test_float64_is_refused() -> None:
    h, *others = cases.dechunk_ema(*random_selection(1, 5), residual=False)
    with ops.use_backend("triton"), pytest.raises(TypeError, match="float64"):
        dechunk_ema(h.double(), *others)


@pytest.mark.parametrize("packed", [False, True])
def test_registration(packed: bool, device: torch.device) -> None:
    case = packed_selection(9, 0, 2) if packed else random_selection(2, 9, capacity=12)
    h, p, sel, gate, residual = cases.dechunk_ema(*case, device=device)
    h = h.nan_to_num()  # opcheck compares whole inputs, and NaN is not equal to itself
    h, p, gate, rows = (x.detach().requires_grad_() for x in (h, p, gate, residual.reshape(-1, 8)))
    token_map = (sel.packed_rows, sel.cu_seqlens, sel.source_cu_seqlens)
    importlib.import_module("dcdit.ops._triton")  # registers it
    torch.library.opcheck(torch.ops.dcdit.dechunk_ema.default, (h, p, gate, rows, *token_map))
    for wanted in ((True, True, True), (False, False, True)):
        grad_args = (randn(*rows.shape, seed=7).to(device), h.detach(), p.detach(), *token_map, *wanted)
        torch.library.opcheck(torch.ops.dcdit.dechunk_ema_bwd.default, grad_args)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_graph_break(packed: bool, device: torch.device) -> None:
    case = packed_selection(9, 0, 2) if packed else random_selection(2, 9, capacity=12)
    args = cases.dechunk_ema(*case, device=device)
    compiled = torch.compile(dechunk_ema, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, *args), run(dechunk_ema, *args))
