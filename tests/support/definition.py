"""Hold a workload of the registry against the definition: its outputs, and every gradient that it wants."""

import copy
from typing import Any

import torch
from support.helpers import args_dtype, assert_close_to_reference, randn, to_float64
from torch import Tensor

from dcdit import ops
from dcdit.profiling.workloads import Workload, tensors_of


def check_workload(workload: Workload, backend: str) -> None:
    """Outputs and gradients on a backend, by the rule of :func:`support.helpers.assert_close_to_reference`.

    A selection has no gradients, and all of it must be equal.
    """
    narrowest = args_dtype(_floats(workload))
    with ops.use_backend(backend):
        actual = _results(workload, narrowest)
    with ops.use_backend("reference"):
        same_dtype, exact = _results(workload, narrowest), _results(_in_float64(workload), narrowest)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        if workload.operation.differentiable:
            terms = _terms_of_bias(exact["output 0"], narrowest) if name == "gradient of out_bias" else 0.0
            assert_close_to_reference(value, exact[name], same_dtype[name], name, terms)
        elif isinstance(value, Tensor):
            assert torch.equal(value, same_dtype[name]), name
        else:
            assert value == same_dtype[name], name


def _results(workload: Workload, narrowest: torch.dtype) -> dict[str, Any]:
    """Outputs by number and gradients by argument; or the fields of a selection."""
    made = workload.call()
    if not workload.operation.differentiable:
        return made._asdict()
    outputs = tensors_of(made)
    cotangents = [_cotangent(output, i, narrowest) for i, output in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, workload.differentiable, cotangents)
    names = [name for name, a in workload.arguments.items() if isinstance(a, Tensor) and a.requires_grad]
    return {
        **{f"output {i}": output.detach() for i, output in enumerate(outputs)},
        **{f"gradient of {name}": gradient for name, gradient in zip(names, gradients, strict=True)},
    }


def _cotangent(output: Tensor, number: int, narrowest: torch.dtype) -> Tensor:
    """The same random numbers in every run, because the narrowest dtype of the workload holds them."""
    return randn(*output.shape, seed=7 + number).to(narrowest).to(output)


def _terms_of_bias(p: Tensor, narrowest: torch.dtype) -> float:
    """The gradient of this bias is one number, a small difference of large sums: the magnitude of its terms."""
    return float((_cotangent(p, 0, narrowest).abs() * p * (1 - p)).sum())


def _in_float64(workload: Workload) -> Workload:
    exact = copy.copy(workload)
    exact.arguments = {
        name: to_float64(a).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for name, a in workload.arguments.items()
    }
    return exact


def _floats(workload: Workload) -> list[Tensor]:
    return [a for a in workload.arguments.values() if isinstance(a, Tensor) and a.is_floating_point()]
