"""Names: what the user's file calls a class, and what an emitted file uses without having it."""

from __future__ import annotations

import builtins
import inspect
import symtable
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn


def scope_of(program: Callable) -> dict[str, Any]:
    """The globals of forward, or of a function."""
    forward = type(program).forward if isinstance(program, nn.Module) else program
    return getattr(inspect.unwrap(forward), "__globals__", {})


def name_in(scope: dict[str, Any], kind: type) -> str:
    """`Out`, or `outputs.Out` where a module is what the file has; "" where neither is."""
    names = [name for name, value in scope.items() if value is kind]
    modules = [name for name, value in scope.items() if isinstance(value, ModuleType)]
    names += [f"{m}.{kind.__name__}" for m in modules if getattr(scope[m], kind.__name__, None) is kind]
    return next((name for name in names if name.isascii()), "")


def undefined_names(text: str) -> set[str]:
    """Globals that a Python file reads and never makes."""
    tables = [symtable.symtable(text, "module.py", "exec")]
    defined = {s.get_name() for s in tables[0].get_symbols() if s.is_assigned() or s.is_imported()}
    for table in tables:
        tables += table.get_children()
    used = {s.get_name() for table in tables for s in table.get_symbols() if s.is_global()}
    return used - defined - set(dir(builtins))
