"""Rows whose squares and products overflow float32, and how well their cosine and its gradients are computed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from support.accuracy import to_float64
from support.inputs import randn, random_cu_seqlens
from torch import Tensor

from dcdit import ops

LENGTH, WIDTH = 12, 40
SCALES: dict[str, tuple[Tensor | float, Tensor | float]] = {
    "q": (1e20, 1.0),
    "k": (1.0, 1e25),
    "both": (1e20, 1e20),
    "largest": (1e38, 1e38),
    "every second row": (torch.tensor([1.0, 1e20] * 6)[:, None], torch.tensor([1e30, 1.0] * 6)[:, None]),
    "at the limit": (torch.tensor([2.0**e for e in range(44, 56)])[:, None], 1.0),
}
"""By which q and k are multiplied."""


def arguments(
    name: str, scale: tuple[Tensor | float, Tensor | float], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """An operation (``cosine``, ``packed`` or ``cosine2d``) and its arguments."""
    q, k = (_rows(s, dtype, seed).to(device) for s, seed in zip(scale, (1, 2), strict=True))
    if name == "cosine2d":
        return ops.boundary_prob_cosine2d, (q, k, (randn(WIDTH, 3, 3, seed=3) / 9).to(device), (3, 4))
    if name == "packed":
        return ops.boundary_prob_cosine, (q[0], k[0], random_cu_seqlens(5, 0, 7).to(device))
    return ops.boundary_prob_cosine, (q, k)


def check(op: Callable[..., Tensor], args: tuple[Any, ...], backend: str) -> None:
    """Against the definition in float64: p, the gradient of each row of q and k, the gradient of a weight."""
    exact, *exact_grads = value_and_gradients(op, [to_float64(a) for a in args], "reference")
    p, *grads = value_and_gradients(op, args, backend)
    torch.testing.assert_close(p.double(), exact, rtol=0, atol=1e-6)
    for grad, exact_grad in zip(grads[:2], exact_grads[:2], strict=True):
        assert grad.isfinite().all()
        assert _relative_error_of_rows(grad, exact_grad) <= 8 * torch.finfo(grad.dtype).eps
    for grad, exact_grad in zip(grads[2:], exact_grads[2:], strict=True):
        torch.testing.assert_close(grad.double(), exact_grad, rtol=0, atol=1e-5)


def value_and_gradients(op: Callable[..., Tensor], args: Sequence[Any], backend: str) -> tuple[Tensor, ...]:
    args = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    with ops.use_backend(backend):
        p = op(*args)
    cotangent = torch.linspace(-1, 1, p.numel(), device=p.device).view(p.shape).to(p.dtype)
    return p.detach(), *torch.autograd.grad(p, leaves, cotangent)


def _rows(scale: Tensor | float, dtype: torch.dtype, seed: int) -> Tensor:
    largest = torch.finfo(torch.bfloat16).max
    return (randn(2, LENGTH, WIDTH, seed=seed) * scale).clamp(-largest, largest).to(dtype)


def _relative_error_of_rows(value: Tensor, exact: Tensor) -> float:
    """The largest, over those rows whose exact norm is a normal number of float32."""
    norm = torch.linalg.vector_norm(exact, dim=-1)
    error = torch.linalg.vector_norm(value.double() - exact, dim=-1)
    return float((error / norm)[norm > 1e-35].amax()) if (norm > 1e-35).any() else 0.0
