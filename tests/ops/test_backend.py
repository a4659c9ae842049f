"""Which backend runs, and what it implements."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dcdit import ops
from dcdit.ops import _torch, _triton, operations, reference
from dcdit.ops.backend import backend_for, backend_name


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


def test_every_backend_has_every_operation() -> None:
    assert set(ops.__all__) - {"TokenSelection", "use_backend"} == operations.OPERATIONS
    names = operations.OPERATIONS - {"varlen_attention"}
    assert len(names) >= 12
    for name in names:
        arguments = list(inspect.signature(getattr(ops, name)).parameters)
        for module in (_torch, _triton, reference):
            assert list(inspect.signature(getattr(module, name)).parameters) == arguments, (module, name)


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
