"""The whole command for a loaded model: everything `flashlight-rewrite` writes and says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rewriter.emit import render
from rewriter.errors import ExitCode, Reason, RewriteError
from rewriter.hosts import RewrittenModel, rewrite_model
from rewriter.options import STAGES
from rewriter.patch import module_text


@dataclass(frozen=True)
class Outcome:
    """What the command line writes and says."""

    files: dict[str, str]
    diagnostics: tuple[Reason, ...]
    code: ExitCode
    printed: str


def package_files(rewritten: RewrittenModel, title: str) -> dict[str, str]:
    """The importable part of OUT."""
    patched = [host.rewritten.patched for host in rewritten.hosts]
    name = "`, `".join(dict.fromkeys(p.class_name for p in patched))
    files = {
        "__init__.py": render("init.py.jinja", title=title, name=name, is_module=patched[0].is_module),
        "module.py": module_text(title, patched),
        "kernels/__init__.py": f'"""Triton kernels of `{name}`, one chain a file."""\n',
    }
    return files | {f"kernels/{k.name}.py": k.text for k in rewritten.kernels}


def run(loaded, options, progress: Callable[[str], None]) -> Outcome:
    """The whole command for a loaded model."""
    from rewriter.check.run import check_package
    from rewriter.emit.test_file import equivalence_test
    from rewriter.report import left_alone, report_on

    if options.stop_after == "load":
        return Outcome({}, (), ExitCode.DONE, _printed({"load": _show_loaded(loaded)}, options))
    title = f"`{loaded.class_name}` of {Path(loaded.shown).name}, its reduction chains as Triton kernels."
    try:
        rewritten = rewrite_model(
            loaded.module,
            loaded.args,
            loaded.kwargs,
            title=title,
            masked_rows=options.masked_rows,
            rows=options.rows,
            stop_after=options.stop_after,
            progress=progress,
        )
    except RewriteError as error:
        site = _shown(error.reason, loaded).site or loaded.site(loaded.line)
        raise RewriteError(error.reason.text, site=site, code=error.code) from error
    left = left_alone(rewritten, rows=options.rows)
    unfused = [_shown(r, loaded) for r in left]
    printed = {"load": _show_loaded(loaded)} | rewritten.printed
    if not rewritten.hosts and not options.writes:
        return Outcome({}, tuple(unfused), ExitCode.DONE, _printed(printed, options))
    if not rewritten.hosts:
        nothing = "no chain of reductions keeps a wide tensor from being written"
        why = "no chain can be fused" if rewritten.unfused else nothing
        said = (Reason(why, loaded.site(loaded.line)), *unfused)
        return Outcome({}, said, ExitCode.NOTHING_TO_FUSE, _printed(printed, options))
    files = package_files(rewritten, title)
    files["test_equivalence.py"] = equivalence_test(loaded, options)
    verdict, code = None, ExitCode.DONE
    if options.check or options.stop_after == "check":
        progress("check")
        verdict = check_package(files, rewritten.kernels, loaded, options)
        code = ExitCode.DONE if verdict["ok"] else ExitCode.CHECK_FAILED
        printed["check"] = json.dumps(verdict, indent=2, ensure_ascii=False)
    progress("report")
    files |= report_on(rewritten, title, left, verdict).files()
    printed["report"] = files["report.md"].strip()
    said = (*verdict["failures"], *verdict["notes"]) if verdict else ()
    checked = [Reason(text, loaded.site(loaded.line)) for text in said]
    return Outcome(files, (*unfused, *checked), code, _printed(printed, options))


def _shown(reason: Reason, loaded) -> Reason:
    """Reasons in the user's file name it as the user did."""
    if reason.site and reason.site.file == str(loaded.file):
        return Reason(reason.text, loaded.site(reason.site.line))
    return reason


def _show_loaded(loaded) -> str:
    leaves, _ = pytree.tree_flatten_with_path((list(loaded.args), loaded.kwargs))
    whole = ("args", "kwargs")
    shown = [f"{whole[path[0].idx]}{pytree.keystr(path[1:])}: {_show_input(leaf)}" for path, leaf in leaves]
    return "\n".join([f"{loaded.class_name} of {loaded.shown}, called with", *shown])


def _show_input(leaf: Any) -> str:
    return f"{leaf.dtype} {tuple(leaf.shape)}" if torch.is_tensor(leaf) else repr(leaf)


def _printed(printed: dict[str, str], options) -> str:
    """What `--explain`, `--print-ir` and `--stop-after` ask for."""
    wanted: list[str] = []
    if options.explain:
        wanted = ["derive", "plan"]
    elif options.print_ir:
        wanted = [options.print_ir] if options.print_ir in STAGES else list(printed)
    elif options.stop_after:
        wanted = [options.stop_after]
    return "\n\n".join(f"# {stage}\n{printed[stage]}" for stage in wanted if printed.get(stage))
