"""Write hashed requirements for CI from reports of pip, one for each version of Python.

On Linux, with ``PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu`` for PyTorch's CPU build, in a checkout::

    python3.11 -m pip install --dry-run --ignore-installed --report 311.json -c constraints.txt '.[dev]'   # 312, 313
    python -m tools.lock 311.json 312.json 313.json > .ci/requirements.txt

`.ci/release-requirements.txt` is made in the same way, of ``build check-wheel-contents setuptools twine`` instead of
``'.[dev]'``. Every file that pip would take is there with its SHA-256. What only some versions of Python need has a
marker.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEAD = """\
# What CI installs, on Linux on x86-64 with CPython {}: every file by its hash (PyTorch as its CPU build).
# Written by `python -m tools.lock`, which says how. Users install with constraints.txt.
"""


def lock(reports: Sequence[dict[str, Any]]) -> str:
    """The text of the requirements."""
    pythons = [report["environment"]["python_version"] for report in reports]
    found: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for python, report in zip(pythons, reports, strict=True):
        for item in report["install"]:
            name, version = (item["metadata"][key] for key in ("name", "version"))
            if "dir_info" not in item["download_info"]:  # else it is this package itself
                requirement = f"{re.sub(r'[-_.]+', '-', name).lower()}", version
                found[requirement][item["download_info"]["archive_info"]["hashes"]["sha256"]].add(python)
    return HEAD.format(", ".join(pythons)) + "".join(
        _requirement(f"{name}=={version}", hashes, pythons) for (name, version), hashes in sorted(found.items())
    )


def _requirement(pinned: str, hashes: dict[str, set[str]], pythons: Sequence[str]) -> str:
    needing = [python for python in pythons if any(python in those for those in hashes.values())]
    marker = " or ".join(f"python_version == '{python}'" for python in needing)
    lines = [pinned if needing == list(pythons) else f"{pinned} ; {marker}"]
    return " \\\n    ".join([*lines, *(f"--hash=sha256:{digest}" for digest in sorted(hashes))]) + "\n"


if __name__ == "__main__":
    print(lock([json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:]]), end="")
