"""Writing the package: all or nothing, only below OUT, and never over what the user edited."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from rewriter import output
from rewriter.errors import ExitCode, RewriteError
from rewriter.output import check_destination, write_package

FILES = {
    "__init__.py": "from .module import apply\n",
    "module.py": "def apply(model): ...\n",
    "kernels/a.py": "A = 1\n",
    "kernels/b.py": "B = 1  # é\n",
    "report.json": '{"z": 1, "files": null, "chains": ["é"]}',
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in files}


def names(paths: tuple[Path, ...], out: Path) -> list[str]:
    return [str(path.relative_to(out)) for path in paths]


def changed(**texts: str) -> dict[str, str]:
    return FILES | {f"kernels/{name}.py": text for name, text in texts.items()}


def test_a_new_package(out):
    result = write_package(out, FILES)
    assert names(result.written, out) == sorted(FILES) and result.kept == ()
    assert {n: t for n, t in contents(out).items() if n != "report.json"} == {
        n: t for n, t in FILES.items() if n != "report.json"
    }
    assert os.listdir(out.parent) == ["out"], "nothing is left beside it"
    assert (out.stat().st_mode & 0o777) == (out.parent.stat().st_mode & 0o777)


def test_the_report_keeps_its_order_and_gets_the_hashes(out):
    write_package(out, FILES)
    report = json.loads((out / "report.json").read_text())
    assert list(report) == ["z", "files", "chains", "generator"] and report["chains"] == ["é"]
    assert list(report["files"]) == ["__init__.py", "kernels/a.py", "kernels/b.py", "module.py"]
    digest = hashlib.sha256((out / "kernels" / "b.py").read_bytes()).hexdigest()
    assert report["files"]["kernels/b.py"] == digest


def test_the_same_input_gives_the_same_bytes(out):
    write_package(out, FILES)
    first = contents(out)
    write_package(out, dict(reversed(FILES.items())))
    assert contents(out) == first


def test_an_edited_kernel_is_kept_until_forced(out):
    write_package(out, FILES)
    (out / "kernels" / "a.py").write_text("A = 99  # tuned\n")
    for _ in range(2):  # the second run must still know
        result = write_package(out, changed(a="A = 2\n", b="B = 2\n"))
        assert names(result.kept, out) == ["kernels/a.py"]
        assert "kernels/a.py" not in names(result.written, out)
        assert contents(out)["kernels/a.py"] == "A = 99  # tuned\n"
        assert contents(out)["kernels/b.py"] == "B = 2\n"
    assert write_package(out, changed(a="A = 2\n"), force=True).kept == ()
    assert contents(out)["kernels/a.py"] == "A = 2\n"


def test_an_edit_that_is_what_we_write_is_none(out):
    write_package(out, FILES)
    (out / "kernels" / "a.py").write_text("A = 2\n")
    assert write_package(out, changed(a="A = 2\n")).kept == ()
    assert write_package(out, changed(a="A = 3\n")).kept == ()


def test_other_files_are_ours_to_replace(out):
    write_package(out, FILES)
    (out / "module.py").write_text("edited\n")
    assert write_package(out, FILES).kept == ()
    assert contents(out)["module.py"] == FILES["module.py"]


def test_stale_kernels_go_unless_edited_or_not_ours(out):
    write_package(out, FILES | {"kernels/c.py": "C = 1\n"})
    (out / "kernels" / "b.py").write_text("B = 7\n")
    (out / "kernels" / "mine.py").write_text("MINE = 1\n")
    (out / "notes.txt").write_text("mine\n")
    fewer = {name: text for name, text in FILES.items() if name != "kernels/b.py"}
    result = write_package(out, fewer)
    assert names(result.removed, out) == ["kernels/c.py"]
    assert names(result.kept, out) == ["kernels/b.py"]
    assert set(contents(out)) == {*FILES, "kernels/mine.py", "notes.txt"}


def test_a_kernel_of_the_users_own_is_not_overwritten(out):
    write_package(out, FILES)
    (out / "kernels" / "c.py").write_text("mine\n")
    assert names(write_package(out, changed(c="C = 1\n")).kept, out) == ["kernels/c.py"]


@pytest.mark.parametrize("report", [None, "{", "[]", '{"files": {}}', '{"generator": "else"}'])
def test_a_folder_that_is_not_ours_is_refused_and_never_emptied(report, out):
    out.mkdir(parents=True)
    (out / "kernels").mkdir()
    (out / "kernels" / "theirs.py").write_text("theirs\n")
    if report is not None:
        (out / "report.json").write_text(report)
    before = contents(out)
    with pytest.raises(RewriteError, match="was not written by flashlight-rewrite") as caught:
        write_package(out, FILES)
    assert caught.value.code == ExitCode.BAD_INPUT and contents(out) == before
    write_package(out, FILES, force=True)
    assert set(contents(out)) == {*FILES, "kernels/theirs.py"}


def test_an_empty_folder_is_fine(out):
    out.mkdir(parents=True)
    write_package(out, FILES)
    assert set(contents(out)) == set(FILES)


@pytest.mark.parametrize("name", ["../x.py", "/tmp/x.py", "a/../../x.py", "", ".", "..\\x.py"])
def test_names_that_lead_out_are_rejected(name, out):
    with pytest.raises(ValueError, match="below the package's folder"):
        write_package(out, {name: "x"})
    assert not out.exists()


def test_a_report_that_names_files_elsewhere_removes_none(out, tmp_path):
    write_package(out, FILES)
    victim = tmp_path / "victim.py"
    victim.write_text("x\n")
    report = json.loads((out / "report.json").read_text())
    digest = hashlib.sha256(victim.read_bytes()).hexdigest()
    report["files"] |= {"kernels/../../../victim.py": digest, str(victim): digest, "": digest}
    (out / "report.json").write_text(json.dumps(report))
    write_package(out, FILES)
    assert victim.exists()


def test_a_link_that_leads_out_is_not_followed(out, tmp_path):
    out.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (out / "kernels").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RewriteError, match="through a link"):
        write_package(out, FILES, force=True)
    assert contents(tmp_path / "elsewhere") == {}


@pytest.mark.parametrize("fails_at", range(1, 9))
def test_a_write_that_fails_leaves_out_as_it_was(fails_at, out, monkeypatch):
    write_package(out, FILES | {"kernels/c.py": "C = 1\n"})
    before = contents(out)
    calls = 0
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(output.os, "replace", failing)
    with pytest.raises(RewriteError, match="No space left on device"):
        write_package(out, changed(a="A = 2\n", d="D = 1\n") | {"new/e.py": ""})
    assert contents(out) == before


def test_an_interrupt_leaves_no_new_out(out, monkeypatch):
    def interrupted(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(output.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_package(out, FILES)
    assert list(out.parent.iterdir()) == []


def test_a_folder_where_a_file_should_be(out):
    write_package(out, FILES)
    (out / "kernels" / "a.py").unlink()
    (out / "kernels" / "a.py").mkdir()
    with pytest.raises(RewriteError, match="is a folder"):
        write_package(out, FILES)
    assert (out / "kernels" / "a.py").is_dir()


def test_checking_leaves_no_trace(out):
    check_destination(out)
    assert not out.parent.exists()


def test_a_broken_link_is_refused(out, tmp_path):
    out.parent.mkdir()
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(RewriteError, match="is not a folder"):
        check_destination(out)
