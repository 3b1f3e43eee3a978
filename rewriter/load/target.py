"""Which class or function of the user's file is meant."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, TypeGuard

from torch import nn

from rewriter.load.source import Source, bad_input

Target = type[nn.Module] | FunctionType

CONVENTIONAL = "Model"  # KernelBench's name
INIT_INPUTS, INPUTS = "get_init_inputs", "get_inputs"


def find_target(source: Source, module: ModuleType, name: str | None) -> Target:
    """The class or function called `name`; without one `Model`, or the only nn.Module there is.

    Raises:
        RewriteError: with code BAD_INPUT, where there is none, or several.
    """
    if name is not None:
        return _named(source, module, name)
    conventional = getattr(module, CONVENTIONAL, None)
    if _is_module_class(conventional):
        return conventional
    return _only_module(source, module)


def _named(source: Source, module: ModuleType, name: str) -> Target:
    found = getattr(module, name, None)
    if _is_module_class(found) or isinstance(found, FunctionType):
        return found
    if hasattr(module, name):
        text = f"{name} is {_kind(found)}, not an nn.Module class or a function"
        raise bad_input(text, source.site(source.line_of(name)))
    known = [*_modules(module), *_functions(module)]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; it defines {', '.join(known) or 'none'}"
    raise bad_input(f"no class or function {name!r}{hint}", source.site())


def _only_module(source: Source, module: ModuleType) -> Target:
    modules = _modules(module)
    if len(modules) == 1:
        return modules.popitem()[1]
    if modules:
        listed = ", ".join(f"{name} (line {source.line_of(name)})" for name in modules)
        example = f"{source.shown}:{next(reversed(modules))}"
        raise bad_input(f"several nn.Modules: {listed}; say which, as {example}", source.site())
    functions = list(_functions(module))
    hint = f"; for a function say {source.shown}:{functions[-1]} with --input" if functions else ""
    raise bad_input(f"no nn.Module in it{hint}", source.site())


def _modules(module: ModuleType) -> dict[str, type[nn.Module]]:
    return _defined(module, _is_module_class)


def _functions(module: ModuleType) -> dict[str, FunctionType]:
    functions = _defined(module, inspect.isfunction)
    return {name: f for name, f in functions.items() if name not in (INIT_INPUTS, INPUTS)}


def _defined(module: ModuleType, wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """What the file defines itself, in its order: imported names and second names left out."""
    own = {n: v for n, v in vars(module).items() if getattr(v, "__name__", None) == n}
    return {n: v for n, v in own.items() if wanted(v) and v.__module__ == module.__name__}


def _is_module_class(value: object) -> TypeGuard[type[nn.Module]]:
    return inspect.isclass(value) and issubclass(value, nn.Module)


def _kind(value: object) -> str:
    if inspect.isclass(value):
        return "another class"
    return f"an instance of {type(value).__name__}"
