"""Autocast changes no operation: the same dtypes and the same bits, forward and backward, on every backend."""

from collections.abc import Callable

import pytest
import torch
from support import interpreter_scan
from support.every_operation import every_operation
from support.inputs import randn, random_cu_seqlens
from torch import Tensor

from dcdit import ops
from dcdit.profiling.workloads import OPERATIONS, Shape, create_workload, tensors_of

SHAPE = Shape(2, (3, 4), 32, 0.4, torch.float32, torch.device("cpu"))
WHERE = [(True, False), (False, True), (True, True)]
"""Whether autocast is on around the forward, and around the backward."""
Run = Callable[[], tuple[Tensor, ...]]


def results(call: Run, leaves: tuple[Tensor, ...], forward: bool, backward: bool) -> list[Tensor]:
    """Outputs and gradients, with autocast on in the forward, in the backward, or in both."""
    with torch.autocast("cpu", torch.bfloat16, enabled=forward):
        outputs = call()
    cotangents = [randn(*out.shape, seed=i).to(out.dtype) for i, out in enumerate(outputs)]
    with torch.autocast("cpu", torch.bfloat16, enabled=backward):
        grads = torch.autograd.grad(outputs, leaves, cotangents) if leaves else ()
    return [*(out.detach() for out in outputs), *grads]


def check(call: Run, leaves: tuple[Tensor, ...], places: list[tuple[bool, bool]] = WHERE) -> None:
    plain = results(call, leaves, False, False)
    for place in places:
        for value, expected in zip(results(call, leaves, *place), plain, strict=True):
            assert value.dtype == expected.dtype
            assert torch.equal(value, expected), f"autocast {place}: off by {(value - expected).abs().max()}"


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter_scan.install(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["torch", "no_reads", "triton", "reference"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_eager(name: str, backend: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if backend == "no_reads":
        backend = "torch"
        pretend_to_be_on_a_gpu(request.getfixturevalue("monkeypatch"))
    workload = create_workload(name, SHAPE._replace(dtype=dtype))
    with ops.use_backend(backend):
        check(lambda: tensors_of(workload.call()), workload.differentiable)


def pretend_to_be_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the paths that read nothing on the host."""
    monkeypatch.setattr("dcdit.ops._torch.host_reads.reads_are_free", lambda _: False)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize(
    ("lengths", "padding"), [((6, 6), 0), ((2, 10), 0), ((2, 7), 3)], ids=["equal", "ragged", "padded"]
)
def test_attention(lengths: tuple[int, ...], padding: int, strided: bool, backend: str) -> None:
    # With channels that do not lie side by side, PyTorch's attention consists of products that autocast would round.
    shape = (8, sum(lengths) + padding, 2) if strided else (sum(lengths) + padding, 2, 8)
    q, k, v = (randn(*shape, seed=seed).requires_grad_() for seed in range(3))
    heads = [x.movedim(0, -1) if strided else x for x in (q, k, v)]
    cu_seqlens, longest = random_cu_seqlens(*lengths), max(lengths)
    with ops.use_backend(backend):
        check(lambda: (ops.varlen_attention(*heads, cu_seqlens, longest, padding=padding > 0),), (q, k, v))


@pytest.mark.parametrize(
    ("backend", "places"),
    [("torch", [(True, False), (False, True)]), ("triton", [(True, True)])],
    ids=["torch", "triton"],
)
def test_compiled(backend: str, places: list[tuple[bool, bool]]) -> None:
    torch.compiler.reset()
    call, inputs = every_operation(SHAPE)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with ops.use_backend(backend):
        check(lambda: compiled(*inputs), tuple(x for x in inputs if x.requires_grad), places)
    torch.compiler.reset()


def test_a_matrix_product_would_be_rounded() -> None:
    """The check itself sees a backward that autocast changes."""
    a, b = randn(4, 4).requires_grad_(), randn(4, 4, seed=1).requires_grad_()
    with pytest.raises(AssertionError, match="off by"):
        check(lambda: (a @ b,), (a, b), [(False, True)])
