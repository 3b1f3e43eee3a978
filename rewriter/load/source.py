"""The user's file as text and syntax, before any of it runs."""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

from rewriter.errors import ExitCode, RewriteError, Site


def bad_input(text: str, site: Site) -> RewriteError:
    """The error for a file or model that can't be used."""
    return RewriteError(text, site=site, code=ExitCode.BAD_INPUT)


@dataclass(frozen=True)
class Source:
    """A Python file that compiles. `shown` is its path as the user wrote it, for messages."""

    path: Path
    shown: str
    tree: ast.Module
    code: CodeType

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders, innermost first, that make up the package of a file with relative imports.

        As many as they climb, and more while those have an `__init__.py`.
        """
        imports = (node for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom))
        parents = self.path.parents
        depth = min(max((node.level for node in imports), default=0), len(parents) - 1)
        while depth and (parents[depth] / "__init__.py").exists():
            depth += 1
        return tuple(parents[:depth])

    @property
    def package(self) -> str:
        """The package that the file's relative imports start from, "" where it has none."""
        return ".".join(folder.name for folder in reversed(self.folders))

    def site(self, line: int = 0) -> Site:
        """A place in the file, as messages show it."""
        return Site(self.shown, line)

    def line_of(self, name: str) -> int:
        """Where the file defines the class or function `name` at its top; 0 where it does not."""
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        lines = [node.lineno for node in self.tree.body if isinstance(node, kinds) and node.name == name]
        return lines[-1] if lines else 0


def read_source(file: Path) -> Source:
    """Read and compile the file without running it.

    Raises:
        RewriteError: with code BAD_INPUT, where it is missing, not Python, or has syntax errors.
    """
    site = Site(str(file))
    if not file.exists():
        raise bad_input("no such file", site)
    if not file.is_file():
        raise bad_input("is a folder, not a Python file" if file.is_dir() else "is no file", site)
    if file.suffix != ".py":
        raise bad_input("is not a Python file (.py)", site)
    # Not resolved: a linked file finds its siblings where the link stands.
    path = Path(os.path.abspath(file))
    try:
        text = path.read_bytes()
    except OSError as error:
        raise bad_input(f"can't be read: {error.strerror}", site) from error
    return _compile(text, path, str(file))


def _compile(text: bytes, path: Path, shown: str) -> Source:
    try:
        tree = ast.parse(text, str(path))
        code = compile(text, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:
        line = error.lineno or 0
        raise bad_input(f"syntax error: {error.msg}", Site(shown, line)) from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise bad_input(f"can't be parsed: {error or type(error).__name__}", Site(shown)) from error
    return Source(path, shown, tree, code)
