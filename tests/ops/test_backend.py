"""Which backend runs, and what it implements."""

import asyncio
import importlib
import inspect
import subprocess
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dcdit import ops
from dcdit.ops import _torch, _triton, operations, reference
from dcdit.ops.backend import backend_for, backend_name
from dcdit.profiling.workloads import Shape, create_workload


def test_cpu_tensors_run_on_torch() -> None:
    assert backend_name(torch.zeros(1)) == "torch"
    assert backend_for(torch.zeros(1)) is _torch


def test_forced_backends_nest_and_end() -> None:
    x = torch.zeros(1)
    with ops.use_backend("reference"):
        assert backend_for(x) is reference
        with ops.use_backend("torch"):
            assert backend_for(x) is _torch
        assert backend_for(x) is reference
    assert backend_for(x) is _torch


def test_a_forced_backend_ends_with_an_error() -> None:
    with pytest.raises(RuntimeError), ops.use_backend("reference"):
        raise RuntimeError
    assert backend_name(torch.zeros(1)) == "torch"


def test_one_object_may_be_used_again_and_inside_itself() -> None:
    x, forced = torch.zeros(1), ops.use_backend("reference")
    for _ in range(2):
        with forced, forced:
            assert backend_name(x) == "reference"
    assert backend_name(x) == "torch"


def test_blocks_of_two_threads_that_overlap() -> None:
    x, names = torch.zeros(1), {}
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with ops.use_backend("reference"):
            first_is_in.set()
            second_is_in.wait(9)
            names["first"] = backend_name(x)
        first_is_out.set()

    def second() -> None:
        first_is_in.wait(9)
        names["second, before"] = backend_name(x)
        with ops.use_backend("triton"):
            second_is_in.set()
            first_is_out.wait(9)
            names["second"] = backend_name(x)
        names["second, after"] = backend_name(x)

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == {"first": "reference", "second, before": "torch", "second": "triton", "second, after": "torch"}
    assert backend_name(x) == "torch"


def test_blocks_of_two_tasks_that_overlap() -> None:
    x = torch.zeros(1)

    async def task(name: str, ticks: int) -> list[str]:
        with ops.use_backend(name):
            seen = []
            for _ in range(ticks):
                await asyncio.sleep(0)
                seen.append(backend_name(x))
        return [*seen, backend_name(x)]

    async def both() -> list[list[str]]:
        return await asyncio.gather(task("reference", 2), task("triton", 4))

    assert asyncio.run(both()) == [["reference"] * 2 + ["torch"], ["triton"] * 4 + ["torch"]]


NUMBERS = {"torch": 1.0, "triton": 2.0, "reference": 3.0}


def number_of_backend(x: Tensor) -> Tensor:
    """x times a number that tells the backend, so that a compiled function shows which one it was traced with."""
    return x * NUMBERS[backend_name(x)]


def test_a_compiled_function_follows_the_block_it_is_called_in() -> None:
    torch.compiler.reset()
    compiled, x = torch.compile(number_of_backend, fullgraph=True, backend="eager"), torch.ones(1)
    for _ in range(2):
        for name in NUMBERS:
            with ops.use_backend(name):
                assert compiled(x).item() == NUMBERS[name]
    seen = []
    with ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(compiled(x).item()))
        thread.start()
        thread.join()
    assert seen == [NUMBERS["torch"]]


@pytest.mark.parametrize("fullgraph", [True, False], ids=["one graph", "graph break"])
def test_a_block_inside_a_compiled_function(fullgraph: bool) -> None:
    torch.compiler.reset()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        with ops.use_backend("reference"):
            if not fullgraph:
                torch._dynamo.graph_break()
            inside = number_of_backend(x)
        return inside, number_of_backend(x)

    compiled, x = torch.compile(function, fullgraph=fullgraph, backend="eager"), torch.ones(1)
    assert [y.item() for y in compiled(x)] == [NUMBERS["reference"], NUMBERS["torch"]]
    with ops.use_backend("triton"):
        assert [y.item() for y in compiled(x)] == [NUMBERS["reference"], NUMBERS["triton"]]
    assert backend_name(x) == "torch"


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    ("forward", "backward"), [("reference", None), (None, "reference"), ("triton", "reference"), (None, None)]
)
def test_a_checkpoint_computes_again_on_its_backend(
    forward: str | None, backward: str | None, use_reentrant: bool
) -> None:
    names = []

    def function(x: Tensor) -> Tensor:
        names.append(backend_name(x))
        return x.sin() * x

    def block(name: str | None) -> AbstractContextManager[None]:
        return ops.use_backend(name) if name else nullcontext()

    x = torch.ones(3, requires_grad=True)
    with block(forward):
        y = checkpoint(function, x, use_reentrant=use_reentrant)
    with block(backward):
        y.sum().backward()
    assert names == [forward or "torch"] * 2
    assert backend_name(x) == "torch"


def test_a_block_inside_a_checkpoint_wins() -> None:
    names = []

    def function(x: Tensor) -> Tensor:
        with ops.use_backend("triton"):
            names.append(backend_name(x))
        return x.sin() * x

    with ops.use_backend("reference"):
        y = checkpoint(function, torch.ones(3, requires_grad=True), use_reentrant=False)
    y.sum().backward()
    assert names == ["triton", "triton"]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_gradient_of_a_checkpoint_is_that_of_its_backend(use_reentrant: bool) -> None:
    workload = create_workload("dechunk_ema", Shape(2, (3, 4), 32, 0.4, torch.float32, torch.device("cpu")))
    h, *rest = workload.arguments.values()
    with ops.use_backend("reference"):
        (expected,) = torch.autograd.grad(ops.dechunk_ema(h, *rest).square().sum(), h)
        y = checkpoint(lambda h: ops.dechunk_ema(h, *rest).square(), h, use_reentrant=use_reentrant)
    h.grad = None
    y.sum().backward()
    assert torch.equal(h.grad, expected)


def test_every_backend_has_every_operation() -> None:
    assert set(ops.__all__) - {"TokenSelection", "use_backend"} == operations.OPERATIONS
    names = operations.OPERATIONS - {"varlen_attention"}
    assert len(names) >= 12
    for name in names:
        arguments = list(inspect.signature(getattr(ops, name)).parameters)
        # Backends select on the grid alone: dcdit.ops puts the tokens outside of it in front, for all of them.
        of_backends = [argument for argument in arguments if argument != "extra_tokens"]
        for module, expected in ((_torch, of_backends), (_triton, of_backends), (reference, arguments)):
            assert list(inspect.signature(getattr(module, name)).parameters) == expected, (module, name)


def test_a_missing_or_doubled_operation_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "some_backend"
    package.mkdir()
    imported = "from dcdit.ops.operations import collect_operations\nglobals().update(collect_operations({}))\n"
    (package / "__init__.py").write_text(imported.format("__name__, __path__"))
    names = sorted(operations.OPERATIONS - {"ratio_loss", "varlen_attention"})
    (package / "most.py").write_text("".join(f"def {name}(): pass\n" for name in names))
    with pytest.raises(ImportError, match="some_backend does not define ratio_loss"):
        importlib.import_module("some_backend")
    (package / "rest.py").write_text("from some_backend.most import *\ndef ratio_loss(): pass\ndef helper(): pass\n")
    module = importlib.import_module("some_backend")
    assert module.ratio_loss.__module__ == "some_backend.rest"
    assert not hasattr(module, "helper")
    (package / "twice.py").write_text("def ratio_loss(): pass\n")
    with pytest.raises(ImportError, match=r"ratio_loss is defined by some_backend\.rest and by some_backend\.twice"):
        importlib.reload(module)


def test_the_compiler_traces_a_backend_that_was_never_imported() -> None:
    code = """
import sys, torch
from dcdit import ops
p = torch.full((1, 4), 0.75)
assert "dcdit.ops._torch" not in sys.modules
print(torch.compile(ops.ratio_loss, fullgraph=True, backend="eager")(p, p > 0.5, 4.0))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("tensor("), done.stderr


def test_a_forced_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def spy(p: Tensor, *_: object) -> Tensor:
        called.append("reference")
        return p.sum()

    monkeypatch.setattr(reference, "ratio_loss", spy)
    p = torch.full((1, 4), 0.75)
    ops.ratio_loss(p, p > 0.5, 4.0)
    assert called == []
    with ops.use_backend("reference"):
        ops.ratio_loss(p, p > 0.5, 4.0)
    assert called == ["reference"]


def test_import_is_light() -> None:
    heavy = ("triton", "einops", "diffusers", "accelerate", "matplotlib", "dcdit.ops._torch", "dcdit.ops._triton")
    code = f"import sys, dcdit, dcdit.ops; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
