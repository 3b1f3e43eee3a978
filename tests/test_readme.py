"""README's example is what the rewriter writes. UPDATE_README=1 puts the present output there."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import pytest

from rewriter.cli import main

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```(python|console|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> dict[str, str]:
    """The example's model, the command with its output, and the kernel's loop."""
    found = BLOCK.findall(README.read_text())
    model, loop, _ = (text for kind, text in found if kind == "python")
    (console,) = (text for kind, text in found if kind == "console")
    return {"model": model, "console": console, "loop": loop}


def loop_of(kernel: str) -> str:
    """From the loop over the stream to the empty line after it."""
    start = kernel.index("    for start in ")
    return kernel[start : kernel.index("\n\n", start) + 1]


@pytest.fixture
def found(tmp_path, monkeypatch) -> dict[str, str]:
    """The same, as they are now."""
    monkeypatch.chdir(tmp_path)
    model = blocks()["model"]
    Path("my_model.py").write_text(model)
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert main(["my_model.py", "-q"]) == 0
    kernel = Path("my_model_flashlight/kernels/model.py").read_text()
    command = "$ flashlight-rewrite my_model.py --check\n"
    return {"model": model, "console": command + stdout.getvalue(), "loop": loop_of(kernel)}


def test_the_example_is_real(found):
    if os.environ.get("UPDATE_README"):
        text = README.read_text()
        for name, old in blocks().items():
            text = text.replace(old, found[name])
        README.write_text(text)
    assert blocks() == found


def test_what_readme_names_exists():
    text = README.read_text()
    paths = re.findall(r"`((?:rewriter|scripts|tests)/[\w/.]+)`", text)
    assert len(paths) > 5 and all((README.parent / path).exists() for path in paths)
