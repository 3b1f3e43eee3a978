"""What a module and its functions keep from call to call, and runs that leave it as it was.

Not a tensor without data may be left in there, nor one with data be found there by a trace, which would hold it for a
constant.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_CONTAINERS = (list, dict, set)

State = dict[tuple[nn.Module, str], Any]  # (module, attribute) → its value, a copy where it is a container


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Puts attributes back at the end, and what was in its lists and dicts."""
    parts = list(module.modules())
    objects, before = [dict(vars(part)) for part in parts], state_of(module)
    try:
        yield
    finally:
        for part, held in zip(parts, objects, strict=True):
            vars(part).clear()
            vars(part).update(held)
            for name, value in held.items():
                if type(value) in _CONTAINERS:
                    refill(value, before[part, name])


def state_of(module: nn.Module) -> State:
    return {
        (part, name): type(value)(value) if type(value) in _CONTAINERS else value
        for part in module.modules()
        for name, value in vars(part).items()
    }


def refill(container: list | dict | set, items: Any) -> None:
    """Puts back what was in a container."""
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(items)


@contextmanager
def nothing_remembered(program: Callable) -> Iterator[None]:
    """Functions of a module's classes, of their files and of its instances compute anew whatever they are asked for."""
    undo: list[Callable[[], None]] = []
    for holder in _holders(program):
        for name, value in list(vars(holder).items()):
            kind = type(value) if isinstance(value, (staticmethod, classmethod)) else lambda function: function
            inner = getattr(value, "__func__", value)
            if _remembers(inner):
                setattr(holder, name, kind(inner.__wrapped__))
                undo.append(functools.partial(setattr, holder, name, value))
            for cell in getattr(inner, "__closure__", None) or ():
                if _remembers(content := _content(cell)):
                    cell.cell_contents = content.__wrapped__
                    undo.append(functools.partial(setattr, cell, "cell_contents", content))
    try:
        yield
    finally:
        for step in undo:
            step()


def _remembers(value: Any) -> bool:
    return callable(getattr(value, "cache_clear", None)) and hasattr(value, "__wrapped__")


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty yet
        return None


def _holders(program: Callable) -> set[Any]:
    modules = list(program.modules()) if isinstance(program, nn.Module) else []
    kinds = {kind for module in modules for kind in type(module).__mro__}
    names = {getattr(inspect.unwrap(owner), "__module__", None) for owner in (*kinds, program)}
    files = [sys.modules[name] for name in names if name in sys.modules]
    own = {file for file in files if file.__name__.split(".")[0] not in ("torch", "builtins")}
    return own.union(modules, (kind for kind in kinds if kind.__module__ in {file.__name__ for file in own}))
