"""cu_seqlens of int64 are read as they are, on every backend, to the same bits."""

from typing import Any

import pytest
import torch
from support import interpreter_scan
from torch import Tensor

from dcdit import ops
from dcdit.ops import TokenSelection
from dcdit.profiling.workloads import CASES, Shape, create_workload

SHAPE = Shape(2, (3, 4), 8, 0.4, torch.float32, torch.device("cpu"))
NAMES = [name for name in CASES if "packed" in name or "cu_seqlens" in create_workload(name, SHAPE).arguments]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter_scan.install(monkeypatch)


def in_int64(value: Any) -> Any:
    if isinstance(value, TokenSelection):
        return value._replace(source_cu_seqlens=in_int64(value.source_cu_seqlens))
    return value.long() if isinstance(value, Tensor) and value.dtype == torch.int32 else value


def test_every_kind_of_operation_is_here() -> None:
    assert {"modulated_layer_norm", "select_tokens_packed", "dechunk_ema_packed"} <= set(NAMES)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_same_bits(name: str, backend: str) -> None:
    workload, other = create_workload(name, SHAPE), create_workload(name, SHAPE)
    other.arguments = {name: in_int64(value) for name, value in other.arguments.items()}
    with ops.use_backend(backend):
        for value, expected in zip(other.run(), workload.run(), strict=True):
            if value.dtype == expected.dtype:
                assert torch.equal(value, expected)
            else:  # the cu_seqlens of the source, which the selection holds
                assert value.dtype == torch.int64 and torch.equal(value.int(), expected)
