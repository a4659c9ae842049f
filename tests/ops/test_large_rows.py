"""The cosine of any finite rows is a number, and so are its gradients: no square and no product overflows."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import interpreter_launch, interpreter_rounding
from support.accuracy import to_float64
from support.inputs import randn, random_cu_seqlens
from torch import Tensor

from dcdit import ops

L, D = 12, 40
SCALES = {
    "q": (1e20, 1.0),
    "k": (1.0, 1e25),
    "both": (1e20, 1e20),
    "largest": (1e38, 1e38),
    "every second row": (torch.tensor([1.0, 1e20] * 6)[:, None], torch.tensor([1e30, 1.0] * 6)[:, None]),
    "at the limit": (torch.tensor([2.0**e for e in range(44, 56)])[:, None], 1.0),
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter_launch.install(monkeypatch)
    interpreter_rounding.install(monkeypatch)


def rows(scale: Tensor | float, dtype: torch.dtype, seed: int) -> Tensor:
    largest = torch.finfo(torch.bfloat16).max
    return (randn(2, L, D, seed=seed) * scale).clamp(-largest, largest).to(dtype)


def value_and_gradients(backend: str, op: Callable[..., Tensor], args: Sequence[Any]) -> tuple[Tensor, ...]:
    args = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    with ops.use_backend(backend):
        p = op(*args)
    cotangent = torch.linspace(-1, 1, p.numel()).view(p.shape).to(p.dtype)
    return p.detach(), *torch.autograd.grad(p, leaves, cotangent)


def relative_error_of_rows(value: Tensor, exact: Tensor) -> float:
    """The largest, over those rows whose exact norm is a normal number of float32."""
    norm = torch.linalg.vector_norm(exact, dim=-1)
    error = torch.linalg.vector_norm(value.double() - exact, dim=-1)
    return float((error / norm)[norm > 1e-35].amax()) if (norm > 1e-35).any() else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["torch", "no_reads", "triton", "reference"])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("name", ["cosine", "packed", "cosine2d"])
def test_large_rows(
    name: str,
    scale: tuple[Tensor | float, Tensor | float],
    backend: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend == "no_reads":
        backend = "torch"
        monkeypatch.setattr("dcdit.ops._torch.host_reads.reads_are_free", lambda _: False)
    q, k = rows(scale[0], dtype, 1), rows(scale[1], dtype, 2)
    if name == "cosine2d":
        op, args = ops.boundary_prob_cosine2d, (q, k, randn(D, 3, 3, seed=3) / 9, (3, 4))
    elif name == "packed":
        op, args = ops.boundary_prob_cosine, (q[0], k[0], random_cu_seqlens(5, 0, 7))
    else:
        op, args = ops.boundary_prob_cosine, (q, k)
    exact, *exact_grads = value_and_gradients("reference", op, [to_float64(a) for a in args])
    p, *grads = value_and_gradients(backend, op, args)
    torch.testing.assert_close(p.double(), exact, rtol=0, atol=1e-6)
    for grad, exact_grad in zip(grads[:2], exact_grads[:2], strict=True):
        assert grad.isfinite().all()
        assert relative_error_of_rows(grad, exact_grad) <= 8 * torch.finfo(grad.dtype).eps
    for grad, exact_grad in zip(grads[2:], exact_grads[2:], strict=True):  # of the weight
        torch.testing.assert_close(grad.double(), exact_grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_large_rows_of_float64(backend: str) -> None:
    q, k = (randn(2, L, D, seed=seed).double() for seed in range(2))
    plain, *plain_grads = value_and_gradients(backend, ops.boundary_prob_cosine, (q, k))
    p, *grads = value_and_gradients(backend, ops.boundary_prob_cosine, (1e200 * q, 1e200 * k))
    torch.testing.assert_close(p, plain)
    for grad, plain_grad in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(1e200 * grad, plain_grad)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_rows_of_zeros_and_of_small_numbers(backend: str) -> None:
    q, k = randn(1, L, D), randn(1, L, D, seed=1)
    q[0, 3], k[0, 4], q[0, 7] = 0, 0, q[0, 7] * 1e-14
    p, *grads = value_and_gradients(backend, ops.boundary_prob_cosine, (q, k))
    assert p[0, 4] == 0.5
    # A norm below 1e-12 counts as 1e-12, so this cosine is small.
    assert abs(p[0, 8] - 0.5) < 0.05
    assert all(grad.isfinite().all() for grad in grads)
