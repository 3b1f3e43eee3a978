"""Building the model and its inputs with the functions that the user's file has for it."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

from rewriter.load.loaded import DICT, LIST, PAIR
from rewriter.load.running import blaming
from rewriter.load.source import Source, bad_input
from rewriter.load.target import CONVENTIONAL, INIT_INPUTS, INPUTS, Target

Call = tuple[tuple[Any, ...], dict[str, Any]]


def seed() -> None:
    """Give the user's code the same random numbers in every run."""
    random.seed(0)
    torch.manual_seed(0)


@dataclass(frozen=True)
class Given:
    """Arguments as a function of the file gave them: in a LIST, a DICT or a PAIR, "" where none did."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    form: str = ""

    @property
    def call(self) -> Call:
        return self.args, self.kwargs


def construct(source: Source, target: Target, given: Given) -> nn.Module | Callable[..., Any]:
    """Build the class.

    Raises:
        RewriteError: with code BAD_INPUT, where the constructor raises.
    """
    if inspect.isfunction(target):
        return target
    seed()
    with blaming(source, f"{target.__name__}(...)", source.line_of(target.__name__)):
        return target(*given.args, **given.kwargs)


def given_inputs(source: Source, module: ModuleType, forward: Callable[..., Any]) -> Given:
    """What `get_inputs` gives.

    Raises:
        RewriteError: with code BAD_INPUT, where it raises or gives no list.
    """
    return _ask(source, module, INPUTS, inspect.signature(forward))


def init_inputs(source: Source, module: ModuleType, cls: Target) -> Given:
    """`get_init_inputs` belongs to `Model`, or to whatever class can't be built without it.

    Raises:
        RewriteError: with code BAD_INPUT, where arguments are missing.
    """
    if inspect.isfunction(cls):
        return Given()
    required = _required(cls)
    has_init = hasattr(module, INIT_INPUTS)
    if has_init and (required or cls.__name__ == CONVENTIONAL):
        return _ask(source, module, INIT_INPUTS, inspect.signature(cls))
    if required:
        raise bad_input(
            f"{cls.__name__}(...) needs {', '.join(required)}: let {INIT_INPUTS}() return them",
            source.site(definition_line(source, cls.__init__) or source.line_of(cls.__name__)),
        )
    return Given()


def _required(cls: type[nn.Module]) -> list[str]:
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(cls).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _ask(source: Source, module: ModuleType, name: str, signature: inspect.Signature) -> Given:
    function = getattr(module, name)
    line = source.line_of(name)
    seed()
    with blaming(source, f"{name}()", line):
        value = function()
    if isinstance(value, dict):
        return Given((), value, DICT)
    if not isinstance(value, (list, tuple)):
        text = f"{name}() gives a value of type {type(value).__name__}, not a list of arguments"
        raise bad_input(text, source.site(line))
    return _pair(value, signature) or Given(tuple(value), {}, LIST)


def _pair(value: list[Any] | tuple[Any, ...], signature: inspect.Signature) -> Given | None:
    """`[args, kwargs]`, as some KernelBench files have it, if it can be called so."""
    match value:
        case [list() | tuple() as args, dict() as kwargs]:
            try:
                signature.bind(*args, **kwargs)
            except TypeError:
                return None
            return Given(tuple(args), kwargs, PAIR)
    return None


def definition_line(source: Source, function: Any) -> int:
    """Where the user's file defines the function; 0 where it stands elsewhere."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_firstlineno if code and code.co_filename == str(source.path) else 0
