"""Building the model and its inputs with the functions that the user's file has for it."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from rewriter.load.running import blaming
from rewriter.load.source import Source, bad_input
from rewriter.load.target import CONVENTIONAL, INIT_INPUTS, INPUTS, Target

Call = tuple[tuple[Any, ...], dict[str, Any]]


def seed() -> None:
    """Give the user's code the same random numbers in every run."""
    random.seed(0)
    torch.manual_seed(0)


def construct(source: Source, module: ModuleType, target: Target) -> nn.Module | Callable[..., Any]:
    """Build the class, with the arguments `get_init_inputs` gives if it wants any.

    Raises:
        RewriteError: with code BAD_INPUT, where arguments are missing or the constructor raises.
    """
    if inspect.isfunction(target):
        return target
    args, kwargs = _init_call(source, module, target)
    seed()
    with blaming(source, f"{target.__name__}(...)", source.line_of(target.__name__)):
        return target(*args, **kwargs)


def given_inputs(source: Source, module: ModuleType, forward: Callable[..., Any]) -> Call:
    """What `get_inputs` gives.

    Raises:
        RewriteError: with code BAD_INPUT, where it raises or gives no list.
    """
    return _ask(source, module, INPUTS, inspect.signature(forward))


def _init_call(source: Source, module: ModuleType, cls: type[nn.Module]) -> Call:
    """`get_init_inputs` belongs to `Model`, or to whatever class can't be built without it."""
    required = _required(cls)
    has_init = hasattr(module, INIT_INPUTS)
    if has_init and (required or cls.__name__ == CONVENTIONAL):
        return _ask(source, module, INIT_INPUTS, inspect.signature(cls))
    if required:
        raise bad_input(
            f"{cls.__name__}(...) needs {', '.join(required)}: let {INIT_INPUTS}() return them",
            source.site(definition_line(source, cls.__init__) or source.line_of(cls.__name__)),
        )
    return (), {}


def _required(cls: type[nn.Module]) -> list[str]:
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _ask(source: Source, module: ModuleType, name: str, signature: inspect.Signature) -> Call:
    function = getattr(module, name)
    line = source.line_of(name)
    seed()
    with blaming(source, f"{name}()", line):
        value = function()
    if isinstance(value, dict):
        return (), value
    if not isinstance(value, (list, tuple)):
        text = f"{name}() gives a value of type {type(value).__name__}, not a list of arguments"
        raise bad_input(text, source.site(line))
    return _pair(value, signature) or (tuple(value), {})


def _pair(value: list[Any] | tuple[Any, ...], signature: inspect.Signature) -> Call | None:
    """`[args, kwargs]`, as some KernelBench files have it, if it can be called so."""
    match value:
        case [list() | tuple() as args, dict() as kwargs]:
            try:
                signature.bind(*args, **kwargs)
            except TypeError:
                return None
            return tuple(args), kwargs
    return None


def definition_line(source: Source, function: Any) -> int:
    """Where the user's file defines the function; 0 where it stands elsewhere."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_firstlineno if code and code.co_filename == str(source.path) else 0
