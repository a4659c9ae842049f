"""What an operation returns depends on its arguments alone: not on defaults of PyTorch, nor on who uses the result."""

from collections.abc import Iterator

import pytest
import torch
from support import interpreter_scan
from support.inputs import randn, random_cu_seqlens
from torch import Tensor

from dcdit import ops
from dcdit.profiling.workloads import OPERATIONS, Shape, Workload, create_workload, tensors_of

SHAPE = Shape(2, (3, 4), 32, 0.4, torch.float32, torch.device("cpu"))
BACKENDS = ["torch", "triton", "reference"]
DIFFERENTIABLE = [name for name, operation in OPERATIONS.items() if operation.differentiable]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter_scan.install(monkeypatch)


@pytest.fixture(params=["meta device", "float64", "device context"])
def other_defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "float64":
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)
    elif request.param == "meta device":
        torch.set_default_device("meta")
        yield
        torch.set_default_device(None)
    else:
        with torch.device("meta"):
            yield


@pytest.fixture(scope="module")
def workloads() -> dict[str, Workload]:
    """Their arguments are made under PyTorch's own defaults."""
    return {name: create_workload(name, SHAPE) for name in OPERATIONS}


def run(workload: Workload) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = tensors_of(workload.call())
    if not workload.differentiable:
        return list(outputs)
    return [*outputs, *torch.autograd.grad(outputs, workload.differentiable, [torch.ones_like(x) for x in outputs])]


@pytest.fixture(scope="module")
def under_own_defaults(workloads: dict[str, Workload]) -> dict[tuple[str, str], list[Tensor]]:
    expected = {}
    for backend in BACKENDS:
        with ops.use_backend(backend):
            expected |= {(backend, name): run(workload) for name, workload in workloads.items()}
    return expected


@pytest.mark.usefixtures("under_own_defaults", "other_defaults")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_other_defaults(
    name: str,
    backend: str,
    workloads: dict[str, Workload],
    under_own_defaults: dict[tuple[str, str], list[Tensor]],
) -> None:
    with ops.use_backend(backend):
        for value, expected in zip(run(workloads[name]), under_own_defaults[backend, name], strict=True):
            torch.testing.assert_close(value, expected)  # dtype and device too


@pytest.mark.usefixtures("other_defaults")
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_attention_under_other_defaults(backend: str) -> None:
    with torch.device("cpu"):
        cu_seqlens = random_cu_seqlens(4, 0, 7)
        q, k, v = (randn(13, 2, 8, dtype=torch.float32, seed=seed).requires_grad_() for seed in range(3))
    with ops.use_backend(backend):
        out = ops.varlen_attention(q, k, v, cu_seqlens, 7, causal=True, padding=True)
        out.sum().backward()
    assert (out.dtype, out.device.type, q.grad.dtype) == (torch.float32, "cpu", torch.float32)


# --- results that are changed in place ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_result_may_be_changed_in_place(name: str, backend: str, workloads: dict[str, Workload]) -> None:
    workload = workloads[name]
    count = 2 if name == "gated_add_modulated_layer_norm" else 1
    with ops.use_backend(backend):
        *_, result = tensors_of(workload.call())
        expected = torch.autograd.grad((2 * result + 1).sum(), workload.differentiable)
        outputs = tensors_of(workload.call())
        assert len(outputs) == count
        changed = outputs[-1]
        changed.mul_(2)
        changed += 1
        for value, wanted in zip(torch.autograd.grad(changed.sum(), workload.differentiable), expected, strict=True):
            assert torch.equal(value, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_that_the_norm_reads_may_not(backend: str, workloads: dict[str, Workload]) -> None:
    with ops.use_backend(backend):
        added, normed = workloads["gated_add_modulated_layer_norm"].call()
        added += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (added + normed).sum().backward()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("lengths", [(4, 4), (3, 5)], ids=["equal", "ragged"])
def test_the_result_of_attention_may_be_changed_in_place(lengths: tuple[int, ...], backend: str) -> None:
    q, k, v = (randn(8, 2, 8, seed=seed).requires_grad_() for seed in range(3))
    grads = []
    with ops.use_backend(backend):
        for in_place in (False, True):
            out = ops.varlen_attention(q, k, v, random_cu_seqlens(*lengths), max(lengths))
            out = out.mul_(2) if in_place else 2 * out
            grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- torch.func ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_torch_func(name: str, backend: str) -> None:
    workload = create_workload(name, SHAPE)
    wanted = {n: a for n, a in workload.arguments.items() if isinstance(a, Tensor) and a.requires_grad}

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return sum(x.square().sum() for x in tensors_of(workload.operation.op(**{**workload.arguments, **tensors})))

    with ops.use_backend(backend):
        expected = torch.autograd.grad(loss(wanted), tuple(wanted.values()))
        tensors = {n: a.detach() for n, a in wanted.items()}
        by_grad = torch.func.grad(loss)(tensors)
        _, pull_back = torch.func.vjp(loss, tensors)
        (by_vjp,) = pull_back(torch.ones(()))
    for value, n in zip(expected, tensors, strict=True):
        torch.testing.assert_close(by_grad[n], value)
        torch.testing.assert_close(by_vjp[n], value)


def test_torch_func_of_attention() -> None:
    q, k, v = (randn(8, 2, 8, seed=seed) for seed in range(3))

    def loss(q: Tensor) -> Tensor:
        return ops.varlen_attention(q, k, v, random_cu_seqlens(3, 5), 5).square().sum()

    q.requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(q.detach()), torch.autograd.grad(loss(q), q)[0])
