"""One function that calls all differentiable operations, for tests that compile it: once for all is much faster."""

from collections.abc import Callable
from typing import Any

from support.inputs import randn, random_cu_seqlens
from torch import Tensor

from dcdit import ops
from dcdit.profiling.workloads import OPERATIONS, Shape, create_workload, tensors_of


def every_operation(shape: Shape) -> tuple[Callable[..., tuple[Tensor, ...]], list[Any]]:
    """The function, and the tensors that it takes. Those that it can be differentiated by require a gradient."""
    workloads = [create_workload(name, shape) for name, op in OPERATIONS.items() if op.differentiable]
    cu_seqlens, attended = random_cu_seqlens(2, 3), [randn(5, 2, 8, seed=s).requires_grad_() for s in range(3)]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest, outputs = iter(tensors), []
        for workload in workloads:
            arguments = {n: next(rest) if isinstance(a, Tensor) else a for n, a in workload.arguments.items()}
            outputs += tensors_of(workload.operation.op(**arguments))
        outputs.append(ops.varlen_attention(*(next(rest) for _ in range(3)), cu_seqlens, 3))
        return tuple(outputs)

    return call, [a for w in workloads for a in w.arguments.values() if isinstance(a, Tensor)] + attended
