"""What `make gpu-test` runs: many processes, nothing that needs no device, sanitizers on our kernels alone."""

from pathlib import Path

import pytest
import torch

from dcdit.kernels import launch
from tools import gpu_suite

ROOT = Path(__file__).resolve().parents[2]


def test_compiling_is_spread_over_processes() -> None:
    command = gpu_suite.pytest_command(gpu_suite.MOST_IMPORTANT_FIRST, 12)
    assert command[command.index("-n") + 1].isdigit()
    assert all(f"--ignore={path}" in command for path in gpu_suite.WITHOUT_A_DEVICE)
    for path in (*gpu_suite.MOST_IMPORTANT_FIRST, *gpu_suite.WITHOUT_A_DEVICE):
        assert (ROOT / path).exists(), path


def test_sanitizers_watch_every_kernel_of_ours() -> None:
    launch.shipped_configs()  # imports all kernel files
    names = gpu_suite.kernel_names()
    assert len(names) == len(set(names)) > 30
    assert {"_gather_kernel", "_modulation_fwd_kernel", "_plug_back_fwd_kernel"} <= set(names)
    for command in gpu_suite.sanitizer_commands("compute-sanitizer"):
        assert [f"kernel_substring={name}" in command for name in names] == [True] * len(names)
        assert command[-2:] == ["-m", "tools.short_run"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main() == 0
    assert "nothing was run and nothing is claimed" in capsys.readouterr().out
    assert not torch.backends.cudnn.allow_tf32  # the tests switch it off: float32 is held against float64
