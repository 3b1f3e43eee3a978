"""Running the user's code: importing it, and turning what it raises into one line of theirs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from rewriter.errors import RewriteError, Site
from rewriter.load.source import Source, bad_input
from rewriter.options import identifier

_LONGEST = 300  # characters of an exception's text; torch's run to pages

# Modules that an earlier load imported from beside its file, and that folder.
_siblings: dict[str, Path] = {}


@contextlib.contextmanager
def beside(source: Source) -> Iterator[None]:
    """Let the user's code import what lies beside it, as `python FILE` does; write no `.pyc`.

    It sees the command line of `python FILE` too, and may change folders: we come back.
    """
    folders = [str(source.path.parent), *(str(folder.parent) for folder in source.folders[-1:])]
    _forget_siblings_elsewhere(source.path.parent)
    before, argv, writes_nothing = set(sys.modules), sys.argv, sys.dont_write_bytecode
    sys.path[:0] = folders
    sys.argv = [source.shown]
    sys.dont_write_bytecode = True  # we write nowhere but in OUT
    try:
        with contextlib.chdir(os.getcwd()):
            yield
    finally:
        sys.argv, sys.dont_write_bytecode = argv, writes_nothing
        for folder in folders:
            with contextlib.suppress(ValueError):  # the user's code may have changed sys.path too
                sys.path.remove(folder)
        new = set(sys.modules) - before
        _siblings.update({name: source.path.parent for name in new if _lies_in(source, name)})


def _forget_siblings_elsewhere(folder: Path) -> None:
    """Forget a `utils` that an earlier file had beside it, or this file would get that one."""
    for top in [name for name, home in _siblings.items() if home != folder]:
        del _siblings[top]
        for name in [name for name in sys.modules if name.split(".")[0] == top]:
            del sys.modules[name]


def _lies_in(source: Source, name: str) -> bool:
    """Whether a module of that name was imported from beside the file, or is the package it is in."""
    folder = source.path.parent
    file = getattr(sys.modules.get(name), "__file__", None)
    is_package = name == source.package.split(".")[0]
    return is_package or file in (str(folder / f"{name}.py"), str(folder / name / "__init__.py"))


@contextlib.contextmanager
def blaming(source: Source, what: str, line: int = 0) -> Iterator[None]:
    """Turn whatever the user's code raises into `file:line: WHAT raised TYPE: text`.

    The line is the deepest one of the user's file that was running, else `line`.

    Raises:
        RewriteError: with code BAD_INPUT.
    """
    try:
        yield
    except (KeyboardInterrupt, RewriteError):
        raise
    except BaseException as error:  # SystemExit too: the file is not ours to end the run
        raise bad_input(f"{what} raised {said(error)}", _blame(error, source, line)) from error


def _blame(error: BaseException, source: Source, line: int) -> Site:
    frames = traceback.walk_tb(error.__traceback__)
    lines = [at for frame, at in frames if frame.f_code.co_filename == str(source.path)]
    return source.site(lines[-1] if lines else line)


def said(error: BaseException) -> str:
    """An exception as one line, its type first."""
    try:
        text = " ".join(str(error).split("Exception raised from")[0].split())
    except Exception:  # the user's own __str__
        text = ""
    if len(text) > _LONGEST:
        text = text[:_LONGEST].rstrip() + " ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def import_source(source: Source) -> ModuleType:
    """Run the file's top level as a module of its own, under a name that no package has.

    Raises:
        RewriteError: with code BAD_INPUT and the user's line, where that raises.
    """
    name = _module_name(source)
    spec = importlib.util.spec_from_file_location(name, source.path)
    assert spec is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    if source.package:
        module.__package__, module.__spec__ = source.package, None
    sys.modules[name] = module
    try:
        with blaming(source, "importing it"):
            # Not the loader's exec_module: that may run a stale .pyc.
            exec(source.code, module.__dict__)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _module_name(source: Source) -> str:
    """The same name for the same file, with no path in it: it may show in what we write."""
    base = name = f"flashlight_user_{identifier(source.path.stem)}"
    count = 1
    while name in sys.modules and sys.modules[name].__file__ != str(source.path):
        count += 1
        name = f"{base}_{count}"
    return name
