"""De-chunking around the tokens outside of the grid: autocast, transforms and the compiler change nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import interpreter_scan
from support.accuracy import differentiate
from support.inputs import randn, random_probs
from torch import Tensor

from dcdit import ops

P = random_probs(2, 12)
SEL = ops.select_tokens(P, extra_tokens=2, capacity=20)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter_scan.install(monkeypatch)


def spatial(h: Tensor, p: Tensor, residual: Tensor | None = None) -> Tensor:
    return ops.dechunk_spatial(h, p, SEL, (3, 4), residual=residual)


def ema(h: Tensor, p: Tensor, residual: Tensor | None = None) -> Tensor:
    return ops.dechunk_ema(h, p, SEL, residual=residual)


both = pytest.mark.parametrize("dechunk", [spatial, ema])
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


@both
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_extra_tokens_come_back_as_they_are(dechunk: Callable[..., Tensor], backend: str) -> None:
    x = randn(2, 14, 8, dtype=torch.bfloat16)
    with ops.use_backend(backend):
        out = dechunk(ops.gather_tokens(x, SEL), P)
    assert torch.equal(out[:, :2], x[:, :2])


@both
@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dechunk: Callable[..., Tensor], backend: str, dtype: torch.dtype) -> None:
    args = randn(20, 8, dtype=dtype), P, randn(2, 14, 8, dtype=dtype, seed=1)
    with ops.use_backend(backend):
        plain = differentiate(dechunk, args)
        with torch.autocast("cpu", torch.bfloat16):
            other = differentiate(dechunk, args)
    for value, expected in zip(other[0] + other[1], plain[0] + plain[1], strict=True):
        assert value.dtype == expected.dtype and torch.equal(value, expected)


@both
@backends
def test_transforms_and_the_compiler(dechunk: Callable[..., Tensor], backend: str) -> None:
    def loss(h: Tensor, p: Tensor) -> Tensor:
        return dechunk(h, p).square().sum()

    args: tuple[Any, ...] = randn(20, 8), P
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with ops.use_backend(backend):
        own = [x.clone().requires_grad_() for x in args]
        expected = torch.autograd.grad(loss(*own), own)
        found = torch.func.grad(loss, (0, 1))(*args), torch.autograd.grad(compiled(*own), own)
    for grads in found:
        for grad, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, wanted)
