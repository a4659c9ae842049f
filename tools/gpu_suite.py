"""Run everything that needs a CUDA device: kernel tests, model tests, and compute-sanitizer on a short run.

    python -m tools.gpu_suite

is `make gpu-test`. Without a GPU it says so and stops.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-test: no CUDA device is visible to PyTorch; nothing was run and nothing is claimed")
        return 0
    print(f"gpu-test: {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    suite = [sys.executable, "-m", "pytest", "-q", "--durations", "10", "tests/kernels", "tests/gpu"]
    failed = subprocess.run(suite, cwd=ROOT).returncode
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("gpu-test: compute-sanitizer is not installed; memcheck and racecheck were not run")
        return failed
    short = [sys.executable, "-m", "tools.short_run"]
    # PyTorch's caching allocator hides accesses outside of a tensor from memcheck.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck"):
        print(f"gpu-test: compute-sanitizer {tool}", flush=True)
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *short]
        failed |= subprocess.run(command, cwd=ROOT, env=environment).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
