"""Programs that tests start."""

import os
import sys
from pathlib import Path


def environment() -> dict[str, str]:
    """Of a program in the folder of the tests: one thread, and the modules that this process finds."""
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
