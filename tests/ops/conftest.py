"""Settings of the operator tests."""

import pytest
import torch

from dcdit.ops._torch import host_reads


@pytest.fixture(params=["reads", "no_reads"], name="host_reads")
def with_and_without_host_reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as on a CPU, and once on the path of GPU tensors, which reads nothing on the host."""
    if request.param == "no_reads":
        monkeypatch.setattr(host_reads, "reads_are_free", lambda _: False)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
