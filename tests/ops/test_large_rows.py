"""The cosine of any finite rows is a number, and so are its gradients: no square and no product overflows."""

import pytest
import torch
from support import large_rows
from support.inputs import randn

from dcdit import ops


@pytest.mark.usefixtures("host_reads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("scale", large_rows.SCALES)
@pytest.mark.parametrize("name", ["cosine", "packed", "cosine2d"])
def test_large_rows(name: str, scale: str, backend: str, dtype: torch.dtype) -> None:
    op, args = large_rows.arguments(name, large_rows.SCALES[scale], dtype)
    large_rows.check(op, args, backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_large_rows_of_float64(backend: str) -> None:
    op, (q, k) = ops.boundary_prob_cosine, (randn(2, 12, 40, seed=seed).double() for seed in range(2))
    plain, *plain_grads = large_rows.value_and_gradients(op, (q, k), backend)
    p, *grads = large_rows.value_and_gradients(op, (1e200 * q, 1e200 * k), backend)
    torch.testing.assert_close(p, plain)
    for grad, plain_grad in zip(grads, plain_grads, strict=True):
        torch.testing.assert_close(1e200 * grad, plain_grad)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_rows_of_zeros_and_of_small_numbers(backend: str) -> None:
    q, k = randn(1, 12, 40), randn(1, 12, 40, seed=1)
    q[0, 3], k[0, 4], q[0, 7] = 0, 0, q[0, 7] * 1e-14
    p, *grads = large_rows.value_and_gradients(ops.boundary_prob_cosine, (q, k), backend)
    assert p[0, 4] == 0.5
    # A norm below 1e-12 counts as 1e-12, so this cosine is small.
    assert abs(p[0, 8] - 0.5) < 0.05
    assert all(grad.isfinite().all() for grad in grads)
