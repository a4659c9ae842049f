"""Run everything that needs a CUDA device: the tests of kernels and model, then compute-sanitizer on a short run.

    python3 -m tools.gpu_suite

is `make gpu-test`. It runs with the plain Python of a machine that has torch and pytest; nothing has to be installed.
Without a GPU it says so and stops.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
MOST_IMPORTANT_FIRST = (
    "tests/gpu",
    "tests/kernels/test_model.py",
    "tests/kernels/test_modulation.py",
    "tests/kernels/test_dechunk_spatial.py",
    "tests/kernels/test_group_norm.py",
    "tests/kernels/test_packing.py",
    "tests/kernels/test_selection.py",
    "tests/kernels/test_boundary_predictability.py",
    "tests/kernels",
)
"""Files and folders of the tests. What a DC-DiT runs in every forward comes first."""
WITHOUT_A_DEVICE = ("tests/kernels/test_ahead_of_time.py", "tests/kernels/test_launch.py")
"""They test compilers and look-ups, which every machine can do."""
PROCESSES = 12
"""Most of the time goes into compiling kernels, one after the other in each process."""


def pytest_command(tests: Sequence[str], processes: int, *options: str) -> list[str]:
    """A command that runs tests on the device, in several processes where pytest-xdist is installed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *options, *tests]
    command += [f"--ignore={path}" for path in WITHOUT_A_DEVICE if path not in tests]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(processes, os.cpu_count() or 1)), "--dist", "load", "--max-worker-restart", "100"]
    return command


def sanitizer_commands(program: str) -> list[list[str]]:
    """compute-sanitizer on :mod:`tools.short_run`, watching our kernels and no others: that is much faster."""
    kernels = [option for name in kernel_names() for option in ("--kernel-name", f"kernel_substring={name}")]
    return [
        [program, "--tool", tool, "--error-exitcode", "1", *kernels, sys.executable, "-m", "tools.short_run"]
        for tool in ("memcheck", "racecheck")
    ]


def kernel_names() -> list[str]:
    """The Triton kernels of this repository, by the names under which a GPU runs them."""
    files = sorted((ROOT / "kernels").glob("*.py"))
    return [name for file in files for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.MULTILINE)]


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-test: no CUDA device is visible to PyTorch; nothing was run and nothing is claimed")
        return 0
    print(f"gpu-test: {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    suite = pytest_command(MOST_IMPORTANT_FIRST, PROCESSES, "--durations", "10")
    failed = subprocess.run(suite, cwd=ROOT).returncode
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("gpu-test: compute-sanitizer is not installed; memcheck and racecheck were not run")
        return failed
    # PyTorch's caching allocator hides accesses outside of a tensor from memcheck.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for command in sanitizer_commands(sanitizer):
        print(f"gpu-test: {' '.join(command[:3])}", flush=True)
        failed |= subprocess.run(command, cwd=ROOT, env=environment).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
