"""The notebooks of examples/ run from the first cell to the last, and the stored ones are small."""

import re
from pathlib import Path

import nbformat
import pytest

from tools import notebooks

ROOT = Path(__file__).parents[2]


def test_the_notebooks_run(tmp_path, monkeypatch) -> None:
    """In a new folder, the second on the run of the first, as a reader would go through them."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DCDIT_NOTEBOOK_STEPS", "2")
    first = notebooks.run(notebooks.EXAMPLES / "quick_start.ipynb", tmp_path)
    assert printed(first)[0].startswith("2 steps, loss ")
    assert "(256, 64) -> (2, 256, 64)" in printed(first)[-1]
    second = notebooks.run(notebooks.EXAMPLES / "where_do_the_tokens_go.ipynb", tmp_path)
    assert sum("correlation with detail" in text for text in printed(second)) == 1
    assert (pictures(first), pictures(second)) == (2, 2)


@pytest.mark.parametrize("path", sorted(notebooks.EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_stored_notebooks_are_small_and_hold_their_outputs(path) -> None:
    assert path.stat().st_size < 300_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(notebook) == 2 and not any(output.name == "stderr" for output in streams(notebook))
    text = " ".join([*printed(notebook), *(cell.source for cell in notebook.cells)])
    assert not re.search(r"(?<![\w.])/(home|tmp|root|work)/", text)


def streams(notebook):
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return [output for output in outputs if output.output_type == "stream"]


def printed(notebook) -> list[str]:
    return [output.text for output in streams(notebook) if output.name == "stdout"]


def pictures(notebook) -> int:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    return sum("image/png" in output.get("data", {}) for output in outputs)
