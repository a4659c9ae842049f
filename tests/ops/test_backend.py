"""Which backend runs."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dcdit import ops
from dcdit.ops import _torch, reference
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
    names = set(ops.__all__) - {"TokenSelection", "use_backend", "varlen_attention"}
    assert names == set(_torch.__all__)
    assert all(callable(getattr(module, name)) for module in (_torch, reference) for name in names)


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
    heavy = ("triton", "diffusers", "accelerate", "matplotlib", "dcdit.ops._torch", "dcdit.ops._triton")
    code = f"import sys, dcdit, dcdit.ops; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
