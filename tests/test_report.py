"""What a report says: where a chain was, what it no longer writes, which sizes are fixed, and why the rest stays."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriter import rewrite
from rewriter.cli import main


def attend(q, k, v):
    scores = q @ k.mT
    return torch.softmax(scores * 0.5, -1) @ v


class Normed(nn.Module):
    """A norm before, and scores over a number made of a length."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x, y):
        x = self.norm(x)
        return attend(x / len(range(y.shape[1])), y, y)


def line_of(text: str) -> int:
    with open(__file__) as file:
        return next(n for n, line in enumerate(file, 1) if line.strip() == text)


SCORES, WEIGHTS = "scores = q @ k.mT", "return torch.softmax(scores * 0.5, -1) @ v"


@pytest.fixture(scope="module")
def plain() -> dict:
    return rewrite(attend, (torch.randn(1, 20, 16), torch.randn(1, 30, 16), torch.randn(1, 30, 16))).report


@pytest.fixture(scope="module")
def normed() -> dict:
    return rewrite(Normed().eval(), (torch.randn(2, 20, 16), torch.randn(2, 23, 16))).report


def test_a_chain_is_where_the_user_wrote_it_in_helpers_too(plain, normed):
    for report, host in ((plain, "attend"), (normed, "Normed")):
        (chain,) = report["chains"]
        assert (chain["host"], chain["file"]) == (host, "test_report.py")
        assert {line_of(SCORES), line_of(WEIGHTS)} <= set(chain["lines"])


def test_bytes_are_counted_for_every_tensor_and_named_by_the_inputs(plain):
    (chain,) = plain["chains"]
    assert chain["bytes_not_written"] == 3 * 20 * 30 * 4  # product, scaled, softmax
    sizes = {"q": torch.empty(2, 3, 16), "k": torch.empty(2, 5, 16)}
    assert eval(chain["bytes_not_written_at_any_size"], {}, sizes) == 3 * 2 * 3 * 5 * 4


def test_each_fixed_size_has_its_line(plain, normed):
    assert {(f["reason"], f["where"]) for f in plain["specialised"]} == {
        (f"{name}.shape[2] = 16, kept whole by a kernel", f"test_report.py:{line_of(WEIGHTS)}") for name in "qkv"
    }
    lines = {f["reason"]: f["where"] for f in normed["specialised"]}
    made = line_of("return attend(x / len(range(y.shape[1])), y, y)")
    assert lines["x.shape[2] = 16, fixed by the program"] == f"test_report.py:{line_of('x = self.norm(x)')}"
    assert lines["y.shape[1] = 23, fixed by the program"] == f"test_report.py:{made}"


ROWS = {
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x * 2, 1),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "amax": lambda x: x - x.amax(-1, keepdim=True),
    "sum": lambda x: x.exp() / x.exp().sum(1)[:, None],
    "mean": lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt(),
}


@pytest.mark.parametrize("name, program", ROWS.items(), ids=ROWS)
def test_lone_rows_are_left_alone_and_named(name, program):
    result = rewrite(program, (torch.randn(4, 8),))
    (left,) = result.report["unfused"]
    assert left["where"].startswith("test_report.py:") and f"a lone row of {name} " in left["reason"]
    assert "--rows asks for it" in left["reason"]
    assert not result.sources


@pytest.mark.parametrize("name, program", ROWS.items(), ids=ROWS)
def test_lone_rows_that_are_asked_for_are_chains_like_others(name, program):
    report = rewrite(program, (torch.randn(4, 8),), rows=True).report
    (chain,) = report["chains"]
    assert report["unfused"] == [] and chain["file"] == "test_report.py" and chain["lines"]


@pytest.mark.parametrize(
    "program", [lambda x: x.sum(-1), lambda x: torch.relu(x) / 2, lambda x: x.mean() * torch.ones(3)]
)
def test_what_is_no_row_is_not_called_one(program):
    assert rewrite(program, (torch.randn(4, 8),)).report["unfused"] == []


def test_rows_beside_a_chain_are_named_once_a_line_and_the_chain_s_own_are_not(normed):
    (left,) = normed["unfused"]
    assert "layer_norm" in left["reason"]


def test_a_program_nothing_of_which_lifts_says_why():
    result = rewrite(attend, [torch.randn(1, 20, 16, dtype=torch.float64)] * 3)
    reasons = {left["reason"] for left in result.report["unfused"]}
    assert reasons == {"left as it was: torch.float64 arithmetic"}


LONE = """\
import torch
from torch import nn

class Model(nn.Module):
    def forward(self, x):
        return torch.softmax(x, -1)

def get_inputs():
    return [torch.randn(4, 8)]
"""


def test_the_command_says_so_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text(LONE)
    assert main(["m.py", "-q"]) == 4
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    assert first.startswith("m.py:4: no chain") and second.startswith("m.py:6: ")
    assert "a lone row of softmax" in second and captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["m.py"]


def test_the_command_rewrites_rows_that_are_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text(LONE)
    assert main(["m.py", "-q", "--rows"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "m_flashlight/kernels/model.py" in captured.out.splitlines()


def test_the_report_is_json_of_what_the_issue_names(plain):
    assert json.loads(json.dumps(plain)) == plain
    assert {"chains", "unfused", "specialised", "check"} <= plain.keys()
