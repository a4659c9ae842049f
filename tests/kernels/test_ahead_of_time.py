"""What can be shown of compiled kernels without a GPU; `make aot` runs the whole matrix."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcdit.profiling.workloads import OPERATIONS

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process in which kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


EVERYWHERE = {"dechunk_spatial"}
"""Operations that use nearly all registers: they are compiled for every target, the others for Hopper alone."""


@pytest.mark.parametrize("op", OPERATIONS)
def test_compiles_without_spills(op: str) -> None:
    targets = ["sm_80", "sm_90", "sm_100", "gfx942"] if op in EVERYWHERE else ["sm_90"]
    arguments = ("--op", op, "--dtype", "bf16", "--width", "1152", "--target", *targets)
    done = run("-m", "tools.aot", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 with spills" in done.stdout


def test_a_spill_is_reported(tmp_path: Path) -> None:
    """The check itself: a kernel whose tile cannot fit the registers must fail it."""
    code = """
import torch, triton, triton.language as tl
from tools import aot
from dcdit.kernels.launch import Launch

@triton.jit
def _fat_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    y = tl.load(x_ptr + SIZE + i)
    tl.store(out_ptr + i, tl.cumsum(tl.exp(x) * y, 0) + tl.cumsum(tl.exp(y) * x, 0))

x = torch.empty(32, dtype=torch.float32)
launch = Launch(_fat_kernel, (1,), (x, x), {"SIZE": 8192, "num_warps": 1})
reports = list(aot.compile_launches([launch], "fp32", 0, "sm_80"))
print(any(report.spills for report in reports))
"""
    script = tmp_path / "fat.py"
    script.write_text(code)
    done = run(str(script))
    assert done.stdout.strip() == "True", done.stdout + done.stderr


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled_operations_match_the_definition(capability: int) -> None:
    """Their PTX runs on a CPU (tools/ptx)."""
    done = run("-m", "support.compiled", str(capability))
    assert done.returncode == 0, done.stdout + done.stderr


def test_kept_counts_share_one_compilation() -> None:
    """No new specialisation over 20 different kept counts: each launch of an operation compiles at most once."""
    done = run("-m", "tools.signatures")
    assert done.returncode == 0, done.stderr
    for name, (launches, specialisations) in json.loads(done.stdout).items():
        assert 0 < specialisations <= launches, f"{name}: {specialisations} specialisations of {launches} launches"
