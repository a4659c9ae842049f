"""Every operation in every case that the registry knows, on both backends, against the definition."""

import inspect

import pytest
import torch
from support import poison, without_a_gpu
from support.accuracy import check_workload

from benchmarks.harness.equality import check_equal
from dcdit import ops
from dcdit.profiling.workloads import (
    CASES,
    OPERATIONS,
    WORKLOADS,
    Operation,
    Shape,
    create_workload,
    run_forward_backward,
)

SHAPE = Shape(2, (4, 7), 40, 0.4, torch.float32, torch.device("cpu"))
NO_ENTRY = {"TokenSelection", "use_backend", "varlen_attention"}
"""Public names that are no operation of ours: attention hands over to the kernels of others (test_attention.py)."""


@pytest.fixture(autouse=True)
def as_kernel_tests_run(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_gpu.install(monkeypatch)
    poison.install(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(name: str, backend: str, dtype: torch.dtype) -> None:
    on_gpu = backend == "triton" and torch.cuda.is_available()
    shape = SHAPE._replace(dtype=dtype, device=torch.device("cuda" if on_gpu else "cpu"))
    check_workload(create_workload(name, shape), backend)


@pytest.mark.parametrize("name", WORKLOADS)
def test_plain_formulation_is_the_definition(name: str) -> None:
    workload = create_workload(name, SHAPE)
    with ops.use_backend("reference"):
        expected = workload.call() if workload.operation.comparable else workload.forward_backward()
    if compare := workload.operation.comparable:
        check_equal(name, compare(workload.plain()()), compare(expected), 0.0)
    else:
        check_equal(name, run_forward_backward(workload.plain(), workload.differentiable), expected, 1e-5)


def test_every_operation_has_an_entry() -> None:
    assert set(ops.__all__) - NO_ENTRY == OPERATIONS.keys()
    assert all(operation.op is getattr(ops, name) for name, operation in OPERATIONS.items())


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_every_name_is_an_argument(operation: Operation) -> None:
    arguments = inspect.signature(operation.op).parameters
    reads = (*operation.forward_reads, *operation.forward_reads_kept, *operation.backward_reads)
    wanted = [name for case in operation.cases.values() for name in case.gradients or ()]
    assert {*reads, *operation.backward_writes, *wanted} <= arguments.keys()
    default = create_workload(operation.name, SHAPE)
    assert default.arguments.keys() <= arguments.keys()
    assert all(default.arguments[name].requires_grad for name in operation.backward_writes)


def test_unknown_workload_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown workload 'sort'.*gather_tokens"):
        create_workload("sort", SHAPE)
