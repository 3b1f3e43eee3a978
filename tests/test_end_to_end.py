"""The command as a user runs it: small model files in, OUT as it should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything here imports Triton

from rewriter.api import import_package  # noqa: E402
from rewriter.cli import main  # noqa: E402
from rewriter.load import load  # noqa: E402
from rewriter.options import parse_options  # noqa: E402

ROOT = Path(__file__).parent.parent

SOFTCAP = """\
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.heads = heads

    def forward(self, x):
        b, s, d = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = 20 * torch.tanh(q @ k.mT / 20)
        p = torch.softmax(scores, -1)
        return self.out((p @ v).transpose(1, 2).reshape(b, s, d)), s


def get_init_inputs():
    return [[], {"dim": 32, "heads": 2}]


def get_inputs():
    return [torch.randn(2, 37, 32)]
"""

CROSS = """\
import torch
from torch import nn
from sizes import DIM


class Projection(nn.Linear):
    pass


class Cross(nn.Module):
    def __init__(self, heads=2):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_kv = Projection(DIM, DIM), Projection(DIM, 2 * DIM)

    def forward(self, x, memory, *, keep=None):
        b, s, _ = x.shape
        q = self.to_q(x).view(b, s, self.heads, -1).transpose(1, 2)
        k, v = self.to_kv(memory).view(b, memory.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / 4
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None, :], float("-inf"))
        return (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(b, s, DIM)
"""

FUNCTION = """\
import torch


def attend(q, k, v, ids):
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) / q.shape[-1] ** 0.5
    same = ids[:, None, :, None] == ids[:, None, None, :]
    p = torch.where(same, scores, float("-inf")).softmax(dim=-1)
    return torch.einsum("bhmn,bhnd->bhmd", p, v)
"""

NOTHING = """\
import torch
from torch import nn


class Model(nn.Module):
    def forward(self, x):
        return torch.relu(x).sum(-1)


def get_inputs():
    return [torch.randn(4, 16)]
"""

MIXED = """\
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        out = torch.softmax(q @ k.mT, -1) @ v
        gains = torch.cumsum(torch.softmax(q @ v.mT, -1), dim=-1)
        return out + gains @ k


def get_inputs():
    return {"x": torch.randn(2, 33, 32)}
"""

IN_PACKAGE = "from .sizes import DIM\n\n" + MIXED.replace("32", "DIM")
READS_ARGV = "import sys\n\nsys.argv[1:] and sys.exit('no arguments')\n\n" + MIXED

UNTRACEABLE = NOTHING.replace("torch.relu(x)", "torch.ones(int(x.max()))")
RAISING = NOTHING.replace("torch.relu(x)", "x.reshape(-1, 7)")

CROSS_INPUTS = ["x=fp32[2,20,32]", "memory=fp32[2,31,32]", "keep=bool[2,31]"]
ATTEND_INPUTS = ["q=fp32[1,2,30,24]", "k=fp32[1,2,30,24]", "v=fp32[1,2,30,24]", "ids=int64[1,30]<3"]


def with_inputs(target: str, inputs: list[str]) -> list[str]:
    return [target, *(word for spec in inputs for word in ("--input", spec))]


COMMANDS = {
    "softcap": ["softcap.py"],
    "fp16": ["softcap.py", "--dtype", "fp16"],
    "cross": with_inputs("cross.py:Cross", CROSS_INPUTS),
    "function": with_inputs("function.py:attend", ATTEND_INPUTS),
    "mixed": ["mixed.py"],
    "in a package": ["package/model.py"],
    "reads argv": ["argv.py"],
}
PACKAGE = {"__init__.py", "module.py", "test_equivalence.py", "report.md", "report.json"}


def write_models(folder: Path) -> None:
    texts = {
        "softcap": SOFTCAP,
        "cross": CROSS,
        "function": FUNCTION,
        "nothing": NOTHING,
        "mixed": MIXED,
        "untraceable": UNTRACEABLE,
        "raising": RAISING,
        "sizes": "DIM = 32\n",
        "argv": READS_ARGV,
        "package/__init__": "",
        "package/sizes": "DIM = 32\n",
        "package/model": IN_PACKAGE,
    }
    (folder / "package").mkdir()
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a run with `--check`, beside its model."""
    folder = tmp_path_factory.mktemp("checked")
    write_models(folder)
    options = ["--check", "--target", "sm_90", "-o", str(folder / "OUT"), "-q"]
    assert main([str(folder / "softcap.py"), *options]) == 0
    return folder / "OUT"


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run_pytest(*folders: Path) -> subprocess.CompletedProcess[str]:
    """As a user would, in a process that knows of no rewriter and no interpreter."""
    hidden = ("PYTHONPATH", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=/"]
    return subprocess.run([*line, *map(str, folders)], capture_output=True, text=True, env=environment, check=False)


# --- what is written


def test_out_holds_the_package_and_nothing_else_is_touched(checked):
    kernels = {f"kernels/{path.name}" for path in (checked / "kernels").glob("[!_]*.py")}
    assert kernels and contents(checked).keys() == PACKAGE | kernels | {"kernels/__init__.py"}
    beside = {path.name for path in checked.parent.iterdir()} - {"OUT"}
    assert beside == {path.name for path in Path().iterdir()}


def test_report_says_what_was_done(checked):
    report = json.loads((checked / "report.json").read_text())
    assert {"chains", "unfused", "specialised", "check"} <= report.keys()
    (chain,) = report["chains"]
    assert chain["host"] == "Model" and chain["passes"] == 1
    assert chain["kernels"] == [f"kernels/{chain['name']}.py"]
    assert chain["derivation"] and chain["bytes_not_written"]
    lines = SOFTCAP.splitlines()
    assert all("scores" in lines[n - 1] or "p @ v" in lines[n - 1] for n in chain["lines"])
    assert report["unfused"] == []


def test_report_holds_the_check(checked):
    check = json.loads((checked / "report.json").read_text())["check"]
    assert check["ok"] and not check["failures"]
    row = check["outputs"]["output[0]"]
    assert 0 < row["error"] <= row["bound"] and row["bound"] == max(2 * row["eager_error"], 2e-6)
    assert any(name.startswith("output[0] at (2, 25, 32)") for name in check["outputs"])
    (compiled,) = check["compiled"]
    assert "for sm_90: " in compiled and "registers" in compiled
    assert "Passed. Run on" in (checked / "report.md").read_text()


def test_no_path_and_no_rewriter_in_what_is_written(checked):
    for name, data in contents(checked).items():
        assert str(checked.parent).encode() not in data, name
        assert not name.endswith(".py") or b"import rewriter" not in data, name


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_the_emitted_test_passes(command, workplace):
    assert main([*command, "-q"]) == 0
    (out,) = workplace.rglob("*_flashlight")
    assert "/" + workplace.name not in (out / "test_equivalence.py").read_text()
    done = run_pytest(out)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


def test_the_emitted_tests_pass_together_from_any_folder(workplace):
    (workplace / "deep").mkdir()
    assert main(["softcap.py", "-q", "-o", "deep/no-identifier"]) == 0
    assert main([*COMMANDS["cross"], "-q"]) == 0
    done = run_pytest(workplace / "deep" / "no-identifier", workplace / "cross_flashlight")
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


def test_the_emitted_test_fails_for_a_wrong_kernel(workplace):
    assert main(["softcap.py", "-q"]) == 0
    kernel = workplace / "softcap_flashlight" / "kernels" / "model.py"
    kernel.write_text(kernel.read_text().replace("tl.sum(p, 1)", "1.01 * tl.sum(p, 1)"))
    done = run_pytest(workplace / "softcap_flashlight")
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout


def test_two_runs_write_the_same_bytes():
    assert main(["softcap.py", "-q", "-o", "first"]) == 0
    assert main(["softcap.py", "-q", "-o", "second"]) == 0
    assert contents(Path("first")) == contents(Path("second"))


def test_an_edited_kernel_is_kept(capsys):
    assert main(["softcap.py", "-q"]) == 0
    kernel = Path("softcap_flashlight/kernels/model.py")
    written = kernel.read_text()
    kernel.write_text(written + "# tuned\n")
    capsys.readouterr()
    assert main(["softcap.py", "-q"]) == 0
    assert f"{kernel}: kept" in capsys.readouterr().err
    assert kernel.read_text() == written + "# tuned\n"
    assert main(["softcap.py", "-q", "--force"]) == 0
    assert kernel.read_text() == written


# --- what is not fused


def test_nothing_to_fuse(capsys):
    assert main(["nothing.py", "-q"]) == 4
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("nothing.py:5: ")
    assert not Path("nothing_flashlight").exists()


def test_what_stays_eager_is_named_beside_what_is_fused(capsys):
    assert main(["mixed.py", "-q"]) == 0
    assert "mixed.py:13: " in capsys.readouterr().err
    report = json.loads(Path("mixed_flashlight/report.json").read_text())
    assert [chain["lines"] for chain in report["chains"]] == [
        [12],
        [13],
    ]  # the weights that the scan reads, written once
    assert "mixed.py:13" in {unfused["where"] for unfused in report["unfused"]}
    assert all(unfused["reason"] for unfused in report["unfused"])


@pytest.mark.parametrize("name, code, line", [("raising", 2, 7), ("untraceable", 3, 7)])
def test_a_failed_run_leaves_nothing(name, code, line, capsys):
    before = contents(Path())
    assert main([f"{name}.py", "-q", "--check"]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"{name}.py:{line}: "), captured.err
    assert contents(Path()) == before


# --- what is printed


STAGES = ("load", "trace", "lift", "derive", "plan", "emit", "patch", "report")


@pytest.mark.parametrize("stage", STAGES)
def test_stop_after_prints_that_stage(stage, capsys):
    assert main(["softcap.py", "-q", "--stop-after", stage]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"# {stage}\n") and len(out.splitlines()) > 1
    assert Path("softcap_flashlight").exists() == (stage in ("patch", "report"))


def test_print_ir(capsys):
    assert main(["softcap.py", "-q", "--print-ir"]) == 0
    out = capsys.readouterr().out
    assert all(f"# {stage}\n" in out for stage in STAGES)
    assert main(["softcap.py", "-q", "--print-ir=lift"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# lift\n") and "tanh(" in out and "# derive" not in out


def test_explain(capsys):
    assert main(["softcap.py", "-q", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "# derive\n" in out and "# plan\n" in out


# --- what `apply` gives


@pytest.fixture
def applied(checked):
    """(the original, a rewritten model of the same parameters, inputs)"""
    options = parse_options([str(checked.parent / "softcap.py")])
    first, second = load(options), load(options)
    package = import_package(checked)
    rewritten = package.apply(second.module)
    kind = type(rewritten)
    assert rewritten is second.module
    assert package.apply(rewritten) is rewritten and type(rewritten) is kind  # once is enough
    return first.module, rewritten, first.args


def test_apply_keeps_the_model_s_state(applied):
    original, rewritten, _ = applied
    assert isinstance(rewritten, type(rewritten).__mro__[2])  # still the user's class
    assert list(rewritten.state_dict()) == list(original.state_dict())
    rewritten.load_state_dict(original.state_dict())
    assert [n for n, _ in rewritten.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert not rewritten.training


@torch.no_grad()
def test_apply_computes_the_same_at_other_sizes(applied, recwarn):
    original, rewritten, _ = applied
    for shape in [(1, 1, 32), (3, 50, 32), (2, 64, 32)]:
        x = torch.randn(shape)
        torch.testing.assert_close(rewritten(x)[0], original(x)[0], rtol=1e-4, atol=1e-5)
    assert not [w for w in recwarn if "original code" in str(w.message)]


@torch.no_grad()
def test_hooks_run(applied):
    _, rewritten, inputs = applied
    seen = []
    rewritten.register_forward_hook(lambda *_: seen.append("model"))
    rewritten.out.register_forward_pre_hook(lambda *_: seen.append("out"))
    rewritten(*inputs)
    assert seen == ["out", "model"]


def test_what_the_kernels_do_not_take_runs_the_original_and_warns_once(applied):
    original, rewritten, inputs = applied
    with pytest.warns(UserWarning, match="runs its original code: .*gradient"):
        out, _ = rewritten(*inputs)
    out.sum().backward()
    assert rewritten.qkv.weight.grad is not None
    rewritten.train()
    with torch.no_grad(), pytest.warns(UserWarning, match="training mode"):
        out, _ = rewritten(*inputs)
    assert torch.equal(out, original(*inputs)[0])


def test_apply_names_what_it_did_not_find(checked):
    with pytest.raises(ValueError, match="no Model"):
        import_package(checked).apply(torch.nn.Linear(2, 2))
