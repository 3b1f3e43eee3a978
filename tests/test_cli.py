"""The command: every bad input is one line, with the user's line in it, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.cli import main

GOOD = """\
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        return self.proj(x) @ x.mT

def get_init_inputs():
    return [8]

def get_inputs():
    return [torch.randn(2, 5, 8)]
"""
PLAIN = "import torch\nfrom torch import nn\nclass Attn(nn.Module):\n    def forward(self, q, k):\n"
PLAIN += "        return q @ k.mT\ndef attend(q, k): return q @ k.mT\nthing = Attn()\n"
TWO = "from torch import nn\nclass A(nn.Module):\n    pass\n\nclass B(nn.Module):\n    pass\n"


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


QK = ["--input", "q=fp32[2,4]", "--input", "k=fp32[2,4]"]

# name: (text of m.py, arguments after it, where the line starts, what it says)
BAD_FILES = {
    "syntax error": ("x = 1\ndef f(:\n", [], "m.py:2: ", "syntax error"),
    "indentation error": ("def f():\nx = 1\n", [], "m.py:2: ", "expected an indented block"),
    "null byte": ("x = 1\0\n", [], "m.py", "null bytes"),
    "return at the top": ("x = 1\nreturn x\n", [], "m.py:2: ", "'return' outside function"),
    "import error": ("x = 1\nimport nowhere_at_all\n", [], "m.py:2: ", "nowhere_at_all"),
    "import error below": ("x = 1\n\nimport helper\n", [], "m.py:3: ", "nowhere_below"),
    "syntax error below": ("\nimport broken\n", [], "m.py:2: ", "broken.py"),
    "exception at import": ("x = {}\nx['key']\n", [], "m.py:2: ", "KeyError: 'key'"),
    "exception without words": (
        "class E(Exception):\n    def __str__(self): return 1 / 0\nraise E\n",
        [],
        "m.py:3: ",
        "importing it raised E\n",
    ),
    "relative import of nothing": ("\nfrom .nothing import x\n", [], "m.py:2: ", "nothing"),
    "exit at import": ("import sys\nsys.exit(4)\n", [], "m.py:2: ", "SystemExit: 4"),
    "empty": ("", [], "m.py: ", "no nn.Module"),
    "only functions": ("def f(x): return x\n", [], "m.py: ", "m.py:f with --input"),
    "several modules": (TWO, [], "m.py: ", "A (line 2), B (line 5)"),
    "no inputs": (PLAIN, [], "m.py:4: ", "no inputs for Attn: define get_inputs()"),
    "unknown class": (PLAIN, [":Atn", *QK], "m.py: ", "did you mean Attn?"),
    "quite unknown class": (PLAIN, [":Zzz", *QK], "m.py: ", "it defines Attn, attend"),
    "an instance": (
        PLAIN,
        [":thing", *QK],
        "m.py: ",
        "an instance of Attn, not an nn.Module class",
    ),
    "a class of another kind": ("class C: pass\n", [":C", *QK], "m.py:1: ", "another class"),
    "unknown name": (PLAIN, ["--input", "qq=fp32[2,4]", *QK], "m.py:4: ", "did you mean q?"),
    "missing name": (PLAIN, QK[:2], "m.py:4: ", "no --input for k"),
    "name twice": (PLAIN, QK + QK[:2], "m.py:4: ", "gives q twice"),
    "unlike shapes": (
        PLAIN,
        ["--input", "q=fp32[2,4]", "--input", "k=fp32[2,5]"],
        "m.py:5: ",
        "forward",
    ),
    "too large": (PLAIN, ["--input", f"q=fp32[{10**13},9]", *QK[2:]], "m.py:4: ", "can't be made"),
    "bound out of the dtype": (
        PLAIN,
        ["--input", "q=int8[4,4]<1000", *QK[2:]],
        "m.py:4: ",
        "--input q: can't be made",
    ),
    "constructor raises": (
        changed("        self.proj", "        assert dim > 8, 'too narrow'\n        self.proj"),
        [],
        "m.py:7: ",
        "Model(...) raised AssertionError: too narrow",
    ),
    "constructor wants more": (
        changed("def __init__(self, dim)", "def __init__(self, dim, heads)"),
        [],
        "m.py:4: ",
        "missing 1 required positional argument: 'heads'",
    ),
    "no get_init_inputs": (
        changed("def get_init_inputs", "def other"),
        [],
        "m.py:5: ",
        "Model(...) needs dim: let get_init_inputs() return them",
    ),
    "get_init_inputs raises": (
        changed("[8]", "[1 / 0]"),
        [],
        "m.py:13: ",
        "get_init_inputs() raised",
    ),
    "get_init_inputs gives no list": (changed("[8]", "8"), [], "m.py:12: ", "of type int"),
    "forward raises": (
        changed("return self.proj(x)", "raise ValueError('not\\nyet') #"),
        [],
        "m.py:10: ",
        "forward raised ValueError: not yet",
    ),
    "forward exits": (
        changed("return self.proj(x)", "raise SystemExit #"),
        [],
        "m.py:10: ",
        "SystemExit",
    ),
    "no forward": (changed("def forward", "def forwards"), [], "m.py:4: ", "NotImplementedError"),
    "too few inputs": (
        changed("[torch.randn(2, 5, 8)]", "[]"),
        [],
        "m.py:9: ",
        "missing 1 required",
    ),
    "too many inputs": (
        changed("[torch.randn(2, 5, 8)]", "[1, 2, 3]"),
        [],
        "m.py:9: ",
        "4 were given",
    ),
    "inputs of other sizes": (changed("(2, 5, 8)", "(2, 5, 7)"), [], "m.py:10: ", "forward raised"),
    "get_inputs raises": (changed("torch.randn(2, 5, 8)", "nope"), [], "m.py:16: ", "NameError"),
    "get_inputs gives a tensor": (
        changed("[torch.randn(2, 5, 8)]", "torch.randn(2, 5, 8)"),
        [],
        "m.py:15: ",
        "get_inputs() gives a value of type Tensor, not a list",
    ),
    "get_inputs wants arguments": (changed("get_inputs():", "get_inputs(n):"), [], "m.py:", "'n'"),
}

# arguments (`m.py` is GOOD), what the line says
BAD_USAGE = {
    "no argument": ([], "arguments are required: FILE[:CLASS]"),
    "unknown flag": (["m.py", "--fast"], "unrecognized arguments: --fast"),
    "two files": (["m.py", "n.py"], "unrecognized arguments: n.py"),
    "abbreviated flag": (["m.py", "--che"], "unrecognized arguments: --che"),
    "quiet and verbose": (["m.py", "-q", "-v"], "not allowed with"),
    "missing file": (["nope.py"], "nope.py: no such file"),
    "missing file, hopeless OUT": (["/dev/null/nope.py"], "no such file"),
    "a folder": (["folder"], "folder: is a folder"),
    "not Python": (["notes.txt"], "notes.txt: is not a Python file"),
    "no name after the colon": (["m.py:"], "'' is not the name of a class"),
    "a line after the colon": (["m.py:12"], "'12' is not the name of a class"),
    "grammar": (["m.py", "--input", "q:fp32"], "--input q:fp32: expected NAME=DTYPE[SHAPE]"),
    "shape": (["m.py", "--input", "q=fp32[1,]"], "expected NAME=DTYPE[SHAPE]"),
    "shape of a name": (["m.py", "--input", "q=fp32[n]"], "expected NAME=DTYPE[SHAPE]"),
    "empty size": (["m.py", "--input", "q=fp32[2,0]"], "sizes start at 1"),
    "input dtype": (["m.py", "--input", "q=fp33[2]"], "no dtype 'fp33'; there are fp32, fp16"),
    "bounded float": (["m.py", "--input", "q=fp32[2]<4"], "a bound is for integers"),
    "bound of 0": (["m.py", "--input", "q=int64[2]<0"], "no integer lies in"),
    "dtype": (["m.py", "--dtype", "fp8"], "invalid choice: 'fp8'"),
    "target": (["m.py", "--target", "sm_90,h100"], "'h100' is not a GPU target"),
    "masked rows": (["m.py", "--masked-rows", "nan"], "invalid choice: 'nan'"),
    "stage": (["m.py", "--stop-after", "lunch"], "invalid choice: 'lunch'"),
    "stage to print": (["m.py", "--print-ir=lunch"], "invalid choice: 'lunch'"),
    "OUT is a file": (["m.py", "-o", "notes.txt"], "notes.txt: exists, and is not a folder"),
    "OUT below a file": (["m.py", "-o", "notes.txt/out"], "is not a folder"),
    "OUT can't be written": (["m.py", "-o", "/proc/nowhere/out"], "/proc/nowhere/out: can't be"),
    "OUT is not ours": (["m.py", "-o", "folder"], "was not written by flashlight-rewrite"),
    "OUT holds the file": (["m.py", "-o", ".", "--force"], "m.py lies in it"),
}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "m.py").write_text(GOOD)
    (tmp_path / "notes.txt").write_text("not ours\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "theirs.txt").write_text("not ours\n")
    (tmp_path / "helper.py").write_text("import nowhere_below\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, of a run that printed nothing else."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n") and captured.err.count("\n") == 1, captured.err
    return captured.err


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_line_with_the_users_line(name, workplace, capsys):
    text, arguments, start, says = BAD_FILES[name]
    Path("m.py").write_text(text)
    chosen = [word for word in arguments if word.startswith(":")]
    before = tree(workplace)
    assert main(["".join(["m.py", *chosen]), *arguments[len(chosen) :]]) == 2
    line = only_line(capsys)
    assert line.startswith(start) and says in line
    assert tree(workplace) == before, "neither OUT nor a __pycache__ appeared"


@pytest.mark.parametrize("name", BAD_USAGE)
def test_bad_usage_is_one_line(name, workplace, capsys):
    arguments, says = BAD_USAGE[name]
    before = tree(workplace)
    assert main(arguments) == 2
    assert says in only_line(capsys)
    assert tree(workplace) == before


def test_verbose_shows_the_traceback(capsys):
    Path("m.py").write_text(BAD_FILES["forward raises"][0])
    assert main(["m.py", "-v"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and 'm.py", line 10, in forward' in err
    assert err.splitlines()[-1].startswith("m.py:10: forward raised ValueError")
