"""Gather and scatter kernels: every bit is moved, padding is zero, the gradient of each is the forward of the other."""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import cases
from support.accuracy import check_against_reference, differentiate
from support.inputs import randn, random_cu_seqlens, random_probs, random_selection
from torch import Tensor

from dcdit import ops
from dcdit.kernels import launch
from dcdit.kernels import packing as kernels
from dcdit.ops import TokenSelection, reference
from dcdit.ops._triton import packing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [8, 24, 136]


def run(op: Any, *args: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    with ops.use_backend("triton"):
        return differentiate(op, args)


def assert_exact(op: Any, *args: Any) -> None:
    """Output and gradients equal those of the definition, to the bit."""
    (out,), grads = run(op, *args)
    (expected,), expected_grads = differentiate(getattr(reference, op.__name__), args)
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)
    for got, wanted in zip(grads, expected_grads, strict=True):
        assert got is not None and wanted is not None and torch.equal(got, wanted)


@st.composite
def selections(draw: st.DrawFn) -> TokenSelection:
    pattern = draw(st.sampled_from(["random", "ties", "none", "all", "one"]))
    images, length, padding = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.sampled_from([None, 0, 1, 37]))
    p, sel = random_selection(images, length, pattern=pattern, seed=draw(st.integers(0, 99)))
    cu_seqlens = random_cu_seqlens(*[length] * images) if draw(st.booleans()) else None
    capacity = None if padding is None else sel.indices.shape[0] + padding
    return reference.select_tokens(p if cu_seqlens is None else p.flatten(), cu_seqlens, capacity=capacity)


@given(sel=selections(), width=st.sampled_from(WIDTHS), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_moves_every_bit(sel: TokenSelection, width: int, dtype: torch.dtype, seed: int, device: torch.device) -> None:
    sel = cases.moved(sel, device)
    assert_exact(ops.gather_tokens, randn(*sel.mask.shape, width, dtype=dtype, seed=seed).to(device), sel)
    tokens = randn(sel.indices.shape[0], width, dtype=dtype, seed=seed).to(device)
    tokens[int(sel.cu_seqlens[-1]) :] = float("nan")  # no padding row may reach the output
    for fill in (0.0, -1.5):
        assert_exact(ops.scatter_tokens, tokens, sel, fill)


@given(
    sel=selections(),
    token=st.sampled_from(cases.TOKENS),
    dtype=st.sampled_from(cases.INTEGERS),
    shared=st.booleans(),
    seed=st.integers(0, 99),
)
def test_moves_integers(
    sel: TokenSelection, token: tuple[int, ...], dtype: torch.dtype, shared: bool, seed: int, device: torch.device
) -> None:
    sel, fill = cases.moved(sel, device), 1 if dtype == torch.bool else 117
    source = (1, sel.mask.shape[1]) if shared and sel.source_cu_seqlens is None else sel.mask.shape
    x = cases.integers(*source, *token, dtype=dtype, seed=seed).to(device)
    t = cases.integers(sel.indices.shape[0], *token, dtype=dtype, seed=seed).to(device)
    with ops.use_backend("triton"):
        moved = [ops.gather_tokens(x, sel), ops.scatter_tokens(t, sel, fill)]
    for actual, expected in zip(
        moved, (reference.gather_tokens(x, sel), reference.scatter_tokens(t, sel, fill)), strict=True
    ):
        assert actual.dtype == dtype and torch.equal(actual, expected)


@pytest.mark.parametrize("token", cases.TOKENS, ids=str)
def test_tokens_of_any_shape(token: tuple[int, ...], device: torch.device) -> None:
    _, sel = random_selection(3, 7, capacity=16)
    sel = cases.moved(sel, device)
    assert_exact(ops.gather_tokens, randn(3, 7, *token).to(device), sel)
    assert_exact(ops.scatter_tokens, randn(16, *token).to(device), sel, 2.5)
    for shape in (token, (*token[:-1], 1)):  # as wide as the tokens, and narrower
        bias = randn(7, *shape[: len(token)], seed=1).to(device)
        check_against_reference(ops.gather_tokens, randn(3, 7, *token).to(device), sel, bias, backend="triton")


@pytest.mark.parametrize("images", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_table_that_images_share(images: int, dtype: torch.dtype, device: torch.device) -> None:
    p = random_probs(3, 7)[:images].to(device)
    sel = reference.select_tokens(p, capacity=max(images, 12))
    check_against_reference(ops.gather_tokens, randn(1, 7, 24, dtype=dtype).to(device), sel, backend="triton")
    bias = randn(7, 24, seed=1).to(device)
    check_against_reference(ops.gather_tokens, randn(1, 7, 24, dtype=dtype).to(device), sel, bias, backend="triton")


@given(
    sel=selections().filter(lambda sel: sel.source_cu_seqlens is None),
    width=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from(DTYPES),
)
@example(
    sel=random_selection(3, 20, pattern="all", capacity=70)[1], width=8, dtype=torch.bfloat16, bias_dtype=torch.float32
)
def test_adds_a_bias(
    sel: TokenSelection, width: int, dtype: torch.dtype, bias_dtype: torch.dtype, device: torch.device
) -> None:
    sel = cases.moved(sel, device)
    x = randn(*sel.mask.shape, width, dtype=dtype).to(device)
    bias = randn(sel.mask.shape[1], width, dtype=bias_dtype, seed=1).to(device)
    check_against_reference(ops.gather_tokens, x, sel, bias, backend="triton")


@pytest.mark.parametrize("width", [1152, 2048])
def test_wide_rows(width: int, device: torch.device) -> None:
    _, sel = random_selection(2, 5, capacity=9)
    sel = cases.moved(sel, device)
    assert_exact(ops.gather_tokens, randn(2, 5, width, dtype=torch.bfloat16).to(device), sel)
    assert_exact(ops.scatter_tokens, randn(9, width, dtype=torch.bfloat16).to(device), sel)
    bias = randn(5, width, seed=1).to(device)
    check_against_reference(ops.gather_tokens, randn(2, 5, width).to(device), sel, bias, backend="triton")


def strided(strides: str, rows: tuple[int, ...], width: int) -> Tensor:
    full = randn(*(2 * n for n in rows), 2 * width)
    if strides == "rows":
        return full[tuple(slice(0, n) for n in rows)][..., :width]
    if strides == "elements":
        return full[tuple(slice(0, n) for n in rows)][..., ::2]
    if strides == "broadcast":
        return randn(width).expand(*rows, width)
    return randn(width, *rows).movedim(0, -1)


@pytest.mark.parametrize("strides", ["rows", "elements", "broadcast", "transposed"])
def test_any_strides(strides: str, device: torch.device) -> None:
    _, sel = random_selection(2, 7, capacity=11)
    sel = cases.moved(sel, device)
    x, t, bias = (strided(strides, rows, 24).to(device) for rows in ((2, 7), (11,), (7,)))
    assert_exact(ops.gather_tokens, x, sel)
    assert_exact(ops.scatter_tokens, t, sel)
    check_against_reference(ops.gather_tokens, x, sel, bias, backend="triton")


@pytest.mark.parametrize("capacity", [None, 5])
def test_no_images(capacity: int | None, device: torch.device) -> None:
    sel = reference.select_tokens(torch.empty(0, 4, device=device), capacity=capacity)
    assert_exact(ops.gather_tokens, torch.empty(0, 4, 8, device=device), sel)
    assert_exact(ops.scatter_tokens, torch.ones(capacity or 0, 8, device=device), sel)
    (_,), (_, grad_bias) = run(ops.gather_tokens, torch.empty(0, 4, 8, device=device), sel, torch.ones(4, 8).to(device))
    assert grad_bias is not None and torch.equal(grad_bias, torch.zeros_like(grad_bias))


def test_gathers_what_it_scattered(device: torch.device) -> None:
    _, sel = random_selection(3, 17)
    sel, tokens = cases.moved(sel, device), randn(sel.indices.shape[0], 24).to(device)
    with ops.use_backend("triton"):
        assert torch.equal(ops.gather_tokens(ops.scatter_tokens(tokens, sel, 9.0), sel), tokens)


def test_only_the_gradients_asked_for(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    _, sel = random_selection(2, 6)
    sel, x, bias = cases.moved(sel, device), randn(2, 6, 8).to(device), randn(6, 8).to(device).requires_grad_()
    monkeypatch.setattr(kernels, "scatter_fwd", None)  # the gradient of x would need it
    with ops.use_backend("triton"):
        ops.gather_tokens(x, sel, bias).sum().backward()
    assert bias.grad is not None


def test_bias_gradient_adds_the_images_in_order(device: torch.device) -> None:
    """A sum in the order of the images, in float32: the same bits every time and for every tiling."""
    p = random_probs(9, 6, keep=0.7)
    sel = cases.moved(reference.select_tokens(p), device)
    grad = randn(sel.indices.shape[0], 24, seed=3).to(device)
    total = torch.zeros(6, 24, device=device)
    for image_rows in sel.packed_rows:
        total += torch.where((image_rows >= 0)[:, None], grad[image_rows.clamp(min=0)], 0.0)
    for _ in range(2):
        assert torch.equal(kernels.bias_bwd(grad, sel.packed_rows, torch.float32), total)


def test_rows_beyond_two_to_the_31_elements(device: torch.device) -> None:
    """The stride fits 32 bits, the offset of the last row does not. Memory that nothing touches costs nothing."""
    stride = 2**30 + 64
    rows = torch.empty(2 * stride + 8, dtype=torch.float16, device=device).as_strided((3, 8), (stride, 1))
    rows.copy_(randn(3, 8, dtype=torch.float16))
    order = torch.tensor([2, 0, 1, 2], device=device)
    assert torch.equal(kernels.gather_fwd(rows, order, None), rows[order])
    assert torch.equal(kernels.scatter_fwd(rows, order.to(torch.int32), 0.0), rows[order])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="writes 4 GiB")
def test_output_beyond_two_to_the_31_elements(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "empty", lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device))
    width = 2048
    packed_rows = torch.full((2**31 // width + 8,), -1, dtype=torch.int32, device=device)
    packed_rows[-1] = 0
    out = kernels.scatter_fwd(torch.ones(1, width, dtype=torch.float16, device=device), packed_rows, 0.0)
    assert bool((out[-1] == 1).all()) and not bool(out[:-1].any())


def arguments(device: torch.device) -> dict[packing.KernelOp, tuple[Any, ...]]:
    _, sel = random_selection(2, 6, capacity=8)
    sel = cases.moved(sel, device)
    x, bias, t = randn(12, 8).to(device), randn(6, 8).to(device), randn(8, 8).to(device)
    return {
        packing._gather: (x.requires_grad_(), sel.indices, sel.packed_rows, bias.requires_grad_(), False),
        packing._scatter: (t.clone().requires_grad_(), sel.indices, sel.packed_rows, 0.5),
        packing._bias_grad: (t, sel.packed_rows, torch.float32),
    }


@pytest.mark.parametrize(
    "op", [packing._gather, packing._scatter, packing._bias_grad], ids=["gather", "scatter", "bias"]
)
def test_registration(op: packing.KernelOp, device: torch.device) -> None:
    torch.library.opcheck(op.op._opoverload, arguments(device)[op])


def test_registration_of_a_shared_table(device: torch.device) -> None:
    x, *others, _, _ = arguments(device)[packing._gather]
    table = x.detach()[:6].requires_grad_()
    torch.library.opcheck(packing._gather.op._opoverload, (table, *others, None, True))


def test_fullgraph(device: torch.device) -> None:
    """Gather and scatter in one graph, for every mask."""

    def there_and_back(x: Tensor, p: Tensor, bias: Tensor) -> Tensor:
        with ops.use_backend("triton"):
            sel = ops.select_tokens(p, capacity=9)
            return ops.scatter_tokens(ops.gather_tokens(x, sel, bias), sel)

    torch._dynamo.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    x, bias = randn(2, 6, 8).to(device), randn(6, 8, seed=1).to(device)
    for seed in range(2):
        p = random_probs(2, 6, keep=0.5, seed=seed).to(device)
        (out,), grads = differentiate(compiled, (x, p, bias))
        (expected,), expected_grads = differentiate(there_and_back, (x, p, bias))
        assert torch.equal(out, expected)
        for i in (0, 2):
            assert torch.equal(grads[i], expected_grads[i])
