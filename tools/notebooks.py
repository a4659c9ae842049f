"""Run the notebooks of ``examples/`` and store what they show, small: ``python -m tools.notebooks --folder DIR``.

DIR is where they run; a run of ``runs/quick_start`` there is used instead of training one. The test suite runs the same
with fewer steps, and stores nothing.
"""

import argparse
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"
SECONDS = 1800
"""For a cell at most."""


def run(path: Path, folder: Path) -> Any:
    """The notebook with its outputs, run in a folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=SECONDS, resources=resources, record_timing=False).execute()
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        if "image/png" in output.get("data", {}):
            output["data"].pop("image/jpeg", None)  # Pillow shows the same picture twice
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="an existing folder to run them in")
    folder = parser.parse_args().folder
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        nbformat.write(run(path, folder), path)
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
