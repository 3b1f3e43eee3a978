"""Notebooks run from top to bottom, and the two files of a pair say the same.

The `.py` is what one edits. `python tests/test_notebooks.py` then writes each `.ipynb` anew, with its outputs.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))
LONGEST = 30  # lines of a function
ABSOLUTE = re.compile(r"""(?:^|[\s"'(=])/\w[\w.-]*/""")

each_notebook = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def executed(script: Path) -> nbformat.NotebookNode:
    """The `.ipynb` beside a `.py`."""
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def text_of(output: nbformat.NotebookNode) -> str:
    """What a cell's output shows: printed, or the plain text of a value."""
    return output.get("text") or output.get("data", {}).get("text/plain", "")


def environment() -> dict[str, str]:
    """As a user's: the checkout can be imported, and the notebook itself chooses Triton's interpreter."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH")]))
    return inherited | {"PYTHONPATH": path}


def write_executed(script: Path) -> None:
    """Writes the `.ipynb`, with no more in it than follows from the `.py`: the same cell ids every time, no clock."""
    notebook = jupytext.read(script)
    for k, cell in enumerate(notebook.cells):
        cell.id = f"cell-{k}"
    client = NotebookClient(notebook, record_timing=False, coalesce_streams=True)
    client.execute(env=environment())
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, script.with_suffix(".ipynb"))


def test_there_are_notebooks():
    assert SCRIPTS


@each_notebook
def test_it_runs(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@each_notebook
def test_both_files_have_the_same_cells(script):
    ours = [(c.cell_type, c.source) for c in jupytext.read(script).cells]
    theirs = [(c.cell_type, c.source) for c in executed(script).cells]
    assert theirs == ours, __doc__


@each_notebook
def test_the_script_survives_a_round_trip(script):
    """Jupyter saves a pair by writing both files: that must not change the `.py`."""
    again = jupytext.writes(jupytext.read(script), fmt="py:percent")
    version = re.compile(r"^#\s+jupytext_version:.*\n", re.MULTILINE)
    assert version.sub("", again) == version.sub("", script.read_text())


@each_notebook
def test_outputs_are_complete_and_of_no_machine(script):
    cells = [c for c in executed(script).cells if c.cell_type == "code"]
    counts = [c.execution_count for c in cells]
    outputs = [o for c in cells for o in c.outputs]
    assert counts == list(range(1, len(cells) + 1))
    assert {(o.output_type, o.get("name", "stdout")) for o in outputs} <= {
        ("stream", "stdout"),
        ("execute_result", "stdout"),
    }
    assert any(map(text_of, outputs))
    assert not [text_of(o) for o in outputs if ABSOLUTE.search(text_of(o))]


@each_notebook
def test_functions_are_short(script):
    tree = ast.parse(script.read_text())
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert not [f.name for f in found if f.end_lineno - f.lineno >= LONGEST]


if __name__ == "__main__":
    for path in SCRIPTS:
        write_executed(path)
