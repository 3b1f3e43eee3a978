"""The command: what goes where with which exit code, as a process and with a stand-in pipeline."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rewriter.cli import Progress, main
from rewriter.errors import ExitCode, Reason, RewriteError, Site

ROOT = Path(__file__).parent.parent

MODEL = """\
import torch
from torch import nn

class Model(nn.Module):
    def forward(self, x):
        return x @ x.mT

def get_inputs():
    return [torch.randn(2, 5, 8)]
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.py").write_text(MODEL)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "theirs.txt").write_text("not ours\n")
    monkeypatch.chdir(tmp_path)


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, of a run that printed nothing else."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n") and captured.err.count("\n") == 1, captured.err
    return captured.err


@dataclass
class Outcome:
    files: dict[str, str] = field(default_factory=dict)
    diagnostics: tuple[Reason, ...] = ()
    code: ExitCode = ExitCode.DONE
    printed: str = ""


FILES = {"__init__.py": "", "kernels/a.py": "A = 1\n", "report.json": '{"chains": []}'}


@pytest.fixture
def pipeline(monkeypatch):
    """Replaces the stages after `load` by what is called with (loaded, options, progress)."""
    module = types.ModuleType("rewriter.command")
    monkeypatch.setitem(sys.modules, "rewriter.command", module)

    def becomes(run):
        module.run = run

    becomes(lambda loaded, options, progress: Outcome(files=FILES))
    return becomes


def raising(error: BaseException):
    def run(loaded, options, progress):
        raise error

    return run


def test_writes_the_package_and_prints_its_paths(pipeline, capsys):
    assert main(["m.py", "-q"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [f"m_flashlight/{name}" for name in sorted(FILES)]
    assert captured.err == ""
    assert json.loads(Path("m_flashlight/report.json").read_text())["chains"] == []


def test_keeps_an_edited_kernel_and_says_so(pipeline, capsys):
    main(["m.py", "-o", "out"])
    Path("out/kernels/a.py").write_text("A = 2  # tuned\n")
    capsys.readouterr()
    assert main(["m.py", "-o", "out", "-q"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("out/kernels/a.py: kept, because it was edited")
    assert "kernels" not in captured.out
    assert main(["m.py", "-o", "out", "--force"]) == 0
    assert Path("out/kernels/a.py").read_text() == "A = 1\n"


def test_nothing_to_fuse_writes_nothing(pipeline, capsys):
    reason = Reason("softmax over 5 is a lone row; --rows rewrites it", Site("m.py", 10))
    outcome = Outcome(FILES, (reason,), ExitCode.NOTHING_TO_FUSE)
    pipeline(lambda *_: outcome)
    assert main(["m.py", "-q"]) == 4
    assert only_line(capsys) == f"m.py:10: {reason.text}\n"
    assert not Path("m_flashlight").exists()


@pytest.mark.parametrize("code", [code for code in ExitCode if code])
def test_a_code_never_comes_without_a_line(code, pipeline, capsys):
    pipeline(lambda *_: Outcome(code=code))
    assert main(["m.py", "-q"]) == code
    assert only_line(capsys).startswith("m.py: ")


def test_a_failing_stage_gives_its_code_and_line(pipeline, capsys):
    pipeline(raising(RewriteError("export failed", site=Site("m.py", 9))))
    assert main(["m.py", "-q"]) == 3
    assert only_line(capsys) == "m.py:9: export failed\n"


def test_interrupt(pipeline, capsys):
    pipeline(raising(KeyboardInterrupt()))
    assert main(["m.py", "-q"]) == 130
    assert only_line(capsys) == "flashlight-rewrite: interrupted\n"


@pytest.mark.parametrize("error", [ZeroDivisionError("a\nb"), SystemExit(0), RecursionError()])
def test_an_error_of_ours_is_one_line_and_verbose_shows_more(error, pipeline, capsys):
    pipeline(raising(error))
    assert main(["m.py", "-q"]) == 3
    line = only_line(capsys)
    assert line.startswith(f"m.py: internal error: {type(error).__name__}")
    assert line.endswith("; run with -v for the traceback\n")
    assert main(["m.py", "-v"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_what_the_user_prints_or_warns_is_not_our_product(pipeline, capsys):
    noise = "import warnings\nprint('loading')\nwarnings.warn('old')\n"
    Path("m.py").write_text(noise + MODEL)
    pipeline(lambda *_: Outcome(printed="s[m,n] = q[m] * k[n]"))
    assert main(["m.py", "-q"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "s[m,n] = q[m] * k[n]\n"
    assert captured.err == "loading\n"


def test_what_other_processes_print_is_not_our_product(pipeline, capfd):
    Path("m.py").write_text("import os\nos.system('echo noise')\n" + MODEL)
    pipeline(lambda *_: Outcome(printed="product"))
    assert main(["m.py", "-q"]) == 0
    assert capfd.readouterr() == ("product\n", "noise\n")


def test_a_file_that_changes_folders_does_not_move_out(pipeline):
    Path("m.py").write_text("import os\nos.chdir('folder')\n" + MODEL)
    assert main(["m.py", "-q", "-o", "out"]) == 0
    assert Path("out/kernels/a.py").exists()


def test_print_ir_does_not_take_the_file_for_a_stage(pipeline):
    seen = []
    pipeline(lambda loaded, options, progress: seen.append(options.print_ir) or Outcome())
    assert main(["--print-ir", "m.py"]) == main(["--print-ir=lift", "m.py"]) == main(["m.py"]) == 0
    assert seen == ["all", "lift", None]


def test_an_early_stop_does_not_mind_a_foreign_out(pipeline):
    pipeline(lambda *_: Outcome(printed="x"))
    assert main(["m.py", "-o", "folder", "--stop-after", "lift"]) == 0
    assert main(["m.py", "-o", "folder"]) == 2


def test_progress_is_a_line_per_stage(pipeline, capsys):
    def run(loaded, options, progress):
        progress("trace")
        progress("lift")
        progress("trace")
        return Outcome()

    pipeline(run)
    main(["m.py"])
    shown = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["load", "trace", "lift", "trace again"]


def test_progress_rewrites_its_line_on_a_terminal_only(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(sys.stderr)
    progress("trace")
    progress("lift")
    progress.drop()
    assert capsys.readouterr().err.startswith("trace ...\r\x1b[Ktrace ")


# --- as a process


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "rewriter", *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)


def test_help_and_version_need_no_torch():
    probe = "import sys; from rewriter.cli import main; main(['--help']); main(['--version']); "
    probe += "main(['nope.py']); main(['broken.py']); main([]); assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", probe],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )


def test_help_is_fast():
    def best(arguments: list[str]) -> float:
        """Seconds of processor time: how busy the machine is does not matter."""

        def once() -> float:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        return min(once() for _ in range(5))

    assert best(["-m", "rewriter", "--help"]) < best(["-c", "pass"]) + 0.2


def test_version_and_help_go_to_stdout():
    version, text = command("--version"), command("--help")
    assert (version.returncode, version.stderr) == (0, "")
    assert version.stdout == "flashlight-rewrite 0.1.0\n"
    assert (text.returncode, text.stderr) == (0, "")
    assert "--masked-rows match|zero" in text.stdout


def test_bad_input_as_a_process():
    Path("m.py").write_text(MODEL.replace("return x", "raise ValueError('not yet')  #"))
    done = command("m.py")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "m.py:6: forward raised ValueError: not yet\n"
