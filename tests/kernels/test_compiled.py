"""Compiled kernels give the right numbers: their PTX runs on a CPU (tests/ptx)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compiled.py"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_operation_matches_the_definition(capability: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
