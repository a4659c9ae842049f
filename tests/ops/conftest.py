"""Settings of the operator tests."""

import sys

import pytest
import torch


@pytest.fixture(params=["reads", "no_reads"])
def host_reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as on a CPU, and once on the path that GPU tensors take, which reads nothing on the host."""
    if request.param == "no_reads":
        import dcdit.ops._torch  # noqa: F401

        for name, module in list(sys.modules.items()):
            if name.startswith("dcdit.ops._torch") and hasattr(module, "reads_are_free"):
                monkeypatch.setattr(module, "reads_are_free", lambda _: False)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
