"""A gradient of a gradient is either right or an error; it never lacks a part."""

import pytest
import torch
from torch import Tensor

from dcdit import ops
from dcdit.profiling.workloads import WORKLOADS, Shape, Workload, create_workload

SHAPE = Shape(2, (3, 4), 32, 0.4, torch.float32, torch.device("cpu"))
NAMES = [name for name in WORKLOADS if create_workload(name, SHAPE).differentiable]
HAVE_SECOND_DERIVATIVE = {
    ("torch", "boundary_prob_predictability"),
    ("torch", "gather_tokens"),
    ("torch", "scatter_tokens"),
    ("torch", "ratio_loss"),
}


def second_gradients(workload: Workload) -> list[Tensor]:
    outputs = workload.call()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = workload.differentiable
    grads = torch.autograd.grad([out.square().sum() for out in outputs], leaves, create_graph=True)
    again = torch.autograd.grad([g.square().sum() for g in grads], leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(again, leaves, strict=True)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_right_or_refused(name: str, backend: str) -> None:
    with ops.use_backend("reference"):
        expected = second_gradients(create_workload(name, SHAPE))
    workload = create_workload(name, SHAPE)
    with ops.use_backend(backend):
        if (backend, name) not in HAVE_SECOND_DERIVATIVE:
            with pytest.raises(RuntimeError, match="no second derivative"):
                second_gradients(workload)
            return
        found = second_gradients(workload)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4)
