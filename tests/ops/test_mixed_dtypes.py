"""Arguments of several float dtypes: of two token tensors the wider one decides, parameters decide nothing."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from support import interpreter_rounding, interpreter_scan
from support.accuracy import check_against_reference, cotangent, differentiate
from support.inputs import randn, random_cu_seqlens, random_selection
from torch import Tensor

from dcdit import ops

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
PAIRS = [(BF16, FP32, FP32), (FP32, BF16, FP32), (BF16, FP16, FP32), (FP16, BF16, FP32), (FP32, FP64, FP64)]
PAIRS += [(FP64, BF16, FP64), (BF16, BF16, BF16)]
"""The dtypes of two arguments, and of the result."""
WIDTH, LENGTH = 16, 12
Arguments = tuple[Any, ...]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter_scan.install(monkeypatch)
    interpreter_rounding.install(monkeypatch)


def rows(a: torch.dtype, b: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    return randn(*shape, dtype=FP32, seed=1).to(a), randn(*shape, dtype=FP32, seed=2).to(b)


def table(seed: int, dtype: torch.dtype = FP32) -> Tensor:
    return randn(2, WIDTH, seed=seed).to(dtype)


CU_SEQLENS = random_cu_seqlens(5, 6)


def gated_add(a: torch.dtype, b: torch.dtype) -> Arguments:
    return *rows(a, b, LENGTH, WIDTH), table(3), CU_SEQLENS


def gated_add_modulated_layer_norm(a: torch.dtype, b: torch.dtype) -> Arguments:
    return *rows(a, b, LENGTH, WIDTH), table(3), table(4), table(5), CU_SEQLENS


def dechunk_ema(a: torch.dtype, b: torch.dtype) -> Arguments:
    p, sel = random_selection(2, LENGTH)
    h = randn(sel.indices.shape[0], WIDTH, seed=1).to(a)
    return h, p, sel, p.clone(), randn(2, LENGTH, WIDTH, seed=2).to(b)


def dechunk_spatial(a: torch.dtype, b: torch.dtype) -> Arguments:
    h, p, sel, gate, residual = dechunk_ema(a, b)
    return h, p, sel, (3, 4), 1.0, gate, residual


def varlen_attention(a: torch.dtype, b: torch.dtype) -> Arguments:
    q, k = rows(a, b, 11, 2, 8)
    return q, k, q.clone(), CU_SEQLENS, 6


MIXED = [gated_add, gated_add_modulated_layer_norm, dechunk_ema, dechunk_spatial, varlen_attention]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("a", "b", "result"), PAIRS, ids=str)
@pytest.mark.parametrize("arguments", MIXED, ids=lambda f: f.__name__)
def test_the_wider_one_decides(
    arguments: Callable[[torch.dtype, torch.dtype], Arguments],
    a: torch.dtype,
    b: torch.dtype,
    result: torch.dtype,
    backend: str,
) -> None:
    op, args = getattr(ops, arguments.__name__), arguments(a, b)
    if backend == "triton" and result == FP64:
        check_float64_is_refused(op, args)
        return
    with ops.use_backend(backend):
        outputs, grads = differentiate(op, args)
    assert {out.dtype for out in outputs} == {result}
    leaves = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]
    # In float64 the definition is no more exact than the operation, and has no error of its own to compare with.
    terms = attention_terms(outputs[0], args) if op is ops.varlen_attention and result == FP64 else {}
    check_against_reference(op, *args, backend=backend, terms=terms)


def attention_terms(output: Tensor, args: Arguments) -> dict[str, float]:
    """The largest sums of magnitudes in the gradients of q and k, which are small differences of them."""
    found = {"q": 0.0, "k": 0.0}
    for first, last in pairwise(CU_SEQLENS.tolist()):
        q, k, v, grad = (x[first:last].double().transpose(0, 1) for x in (*args[:3], cotangent(output, args)))
        scale = q.shape[-1] ** -0.5
        p, grad_p = (scale * q @ k.mT).softmax(-1), grad.abs() @ v.abs().mT
        grad_scores = scale * p * (grad_p + (p * grad_p).sum(-1, keepdim=True))
        sums = {"q": grad_scores @ k.abs(), "k": grad_scores.mT @ q.abs()}
        found = {name: max(found[name], float(sums[name].max())) for name in found}
    return found


def check_float64_is_refused(op: Callable[..., Any], args: Arguments) -> None:
    if op is ops.varlen_attention:  # its kernel for float64 is PyTorch's, whatever the backend
        return
    with ops.use_backend("triton"), pytest.raises(TypeError, match=r"float64.*accepts float32, bfloat16, float16"):
        op(*args)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize(("a", "b"), [(BF16, FP32), (FP32, BF16), (FP32, FP64), (FP64, FP32)], ids=str)
@pytest.mark.parametrize("name", ["cosine", "cosine2d", "cosine2d weight", "predictability"])
def test_probabilities_are_float64_if_an_argument_is(name: str, a: torch.dtype, b: torch.dtype, backend: str) -> None:
    if name == "predictability":
        op = ops.boundary_prob_predictability
        args: Arguments = (randn(2, 8, 3, 4).to(a), *(randn(8, seed=s).to(b) for s in (1, 2, 3)), randn(seed=4))
    elif name == "cosine":
        op, args = ops.boundary_prob_cosine, rows(a, b, 2, LENGTH, WIDTH)
    else:
        q, k = rows(a, a if "weight" in name else b, 2, LENGTH, WIDTH)
        op, args = ops.boundary_prob_cosine2d, (q, k, (randn(WIDTH, 3, 3, seed=3) / 9).to(b), (3, 4))
    if backend == "triton" and FP64 in (a, b):
        check_float64_is_refused(op, args)
        return
    with ops.use_backend(backend):
        outputs, grads = differentiate(op, args)
    assert outputs[0].dtype == (FP64 if FP64 in (a, b) else FP32)
    assert [g.dtype for g in grads] == [x.dtype for x in args if isinstance(x, Tensor)]
    if backend != "reference":
        check_against_reference(op, *args, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize(("tokens", "parameter"), [(BF16, FP32), (FP32, BF16), (FP16, BF16)], ids=str)
def test_parameters_decide_nothing(tokens: torch.dtype, parameter: torch.dtype, backend: str) -> None:
    p, sel = random_selection(2, LENGTH)
    x, added = randn(2, LENGTH, WIDTH).to(tokens), randn(11, WIDTH).to(tokens)
    with ops.use_backend(backend):
        assert ops.gather_tokens(x, sel, randn(LENGTH, WIDTH).to(parameter)).dtype == tokens
        assert ops.modulated_layer_norm(added, table(1, parameter), table(2, parameter), CU_SEQLENS).dtype == tokens
        assert ops.gated_add(added, added, table(1, parameter), CU_SEQLENS).dtype == tokens
        assert ops.dechunk_ema(ops.gather_tokens(x, sel), p.to(parameter), sel).dtype == tokens
        weight = randn(WIDTH).to(parameter)
        assert ops.group_norm_silu(x, 4, weight, weight, table(1, parameter)).dtype == tokens
