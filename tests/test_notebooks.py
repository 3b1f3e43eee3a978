"""Notebooks run from top to bottom, and the two files of a pair say the same.

After changing a notebook's `.py`, write its `.ipynb` anew:

    jupytext --to ipynb notebooks/NAME.py && jupyter execute --inplace notebooks/NAME.ipynb
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


def test_there_are_notebooks():
    assert SCRIPTS


@each_notebook
def test_it_runs(script, tmp_path):
    """As a user runs it: elsewhere, and with the interpreter chosen by the notebook itself."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
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
    assert [c.execution_count for c in cells] == list(
        range(1, len(cells) + 1)
    ), "run it top to bottom"
    outputs = [o for c in cells for o in c.outputs]
    assert outputs and not [
        o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"
    ]
    assert not [text_of(o) for o in outputs if ABSOLUTE.search(text_of(o))]


@each_notebook
def test_functions_are_short(script):
    tree = ast.parse(script.read_text())
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert not [f.name for f in found if f.end_lineno - f.lineno >= LONGEST]
