"""The user's signature, and how each traced tensor is reached from it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rewriter.errors import RewriteError
from rewriter.patch.literal import Text, is_plain, literal
from rewriter.trace import TracedModule

_VARIADIC = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


@dataclass(frozen=True)
class Signature:
    """`text` is the parameter list; `leaves` maps placeholders to expressions; `conditions` hold of calls alike: a
    condition that may need those before it, and what is said where it does not hold.
    """

    text: str
    leaves: dict[str, str]
    conditions: tuple[tuple[str, str], ...]
    forwarded: str


def signature_of(traced: TracedModule) -> Signature:
    """Raises RewriteError where an argument can't be reached or compared."""
    function = traced.module.forward if isinstance(traced.module, nn.Module) else traced.module
    signature = inspect.signature(function)
    bound = signature.bind(*traced.args, **traced.kwargs)
    paths = [entry for name, value in bound.arguments.items() for entry in _leaves(name, value)]
    leaves = pytree.tree_leaves((traced.args, traced.kwargs))
    if len(paths) != len(leaves):
        raise RewriteError("arguments that are not passed by name or position")
    tensors = {name: text for name, (text, _) in zip(traced.inputs, paths) if name}
    values = [_unchanged(text, leaf) for text, leaf in paths if not torch.is_tensor(leaf)]
    conditions = (*_shapes(signature, bound), *values)
    return Signature(_parameters(signature), tensors, conditions, _forwarded(signature))


def _leaves(text: str, value: Any) -> list[tuple[str, Any]]:
    """(expression, value) of every leaf, in the order the tracer flattens arguments."""
    return [(text + pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(value)[0]]


def _shapes(signature: inspect.Signature, bound: inspect.BoundArguments) -> list[tuple[str, str]]:
    """What must be true of arguments beside their leaves: how many there are, and those left at their default."""
    given = set(bound.arguments)
    bound.apply_defaults()
    out: list[tuple[str, str]] = []
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind in _VARIADIC:
            out += _contents(name, value)
        elif name in given:
            out += _containers(name, value)
        else:
            out.append(_unchanged(name, value))
    return out


def _containers(text: str, value: Any) -> Iterator[tuple[str, str]]:
    """Of lists, dicts and the like that hold leaves: that they are such, and what they hold."""
    if pytree.tree_is_leaf(value):
        return
    if type(value) in (list, tuple):
        yield f"isinstance({text}, (list, tuple))", f"{text} is no list or tuple"
    elif isinstance(value, dict):
        yield f"isinstance({text}, dict)", f"{text} is no dict"
    else:
        kind = type(value).__qualname__
        yield f"type({text}).__qualname__ == {kind!r}", f"{text} is no {kind}"
    yield from _contents(text, value)


def _contents(text: str, value: Any) -> Iterator[tuple[str, str]]:
    """`len(kv)`, `set(options)`: another number of tensors would be another program."""
    if isinstance(value, dict):
        yield _unchanged(f"set({text})", set(value))
    elif isinstance(value, (list, tuple)):
        yield f"len({text}) == {len(value)}", f"len({text}) is not {len(value)}"
    for path, item in pytree.tree_flatten_with_path(value, is_leaf=lambda held: held is not value)[0]:
        yield from _containers(text + pytree.keystr(path), item)


def _unchanged(text: str, value: Any) -> tuple[str, str]:
    """That it has the value. Raises RewriteError where the value's repr can't be read back."""
    if not is_plain(value):
        raise RewriteError(f"{text} is a {type(value).__name__}, which a later call's can't be compared with")
    written = literal(value)
    if value is None or isinstance(value, bool):
        return f"{text} is {written}", f"{text} is not {written}"
    no_tensor = f"not isinstance({text}, torch.Tensor) and " if isinstance(value, (int, float)) else ""
    return f"{no_tensor}{text} == {written}", f"{text} is not {written}"


def _parameters(signature: inspect.Signature) -> str:
    """The parameters without annotations. Raises RewriteError for defaults that can't be written down."""
    plain = []
    for parameter in signature.parameters.values():
        parameter = parameter.replace(annotation=inspect.Parameter.empty)
        if parameter.default is not inspect.Parameter.empty:
            if not is_plain(parameter.default):
                raise RewriteError(f"the default of {parameter.name} can't be written down")
            parameter = parameter.replace(default=Text(literal(parameter.default)))
        plain.append(parameter)
    return str(inspect.Signature(plain))[1:-1]


def _forwarded(signature: inspect.Signature) -> str:
    """The arguments of a call that passes everything on."""
    out = []
    for p in signature.parameters.values():
        if p.kind is inspect.Parameter.VAR_POSITIONAL:
            out.append(f"*{p.name}")
        elif p.kind is inspect.Parameter.VAR_KEYWORD:
            out.append(f"**{p.name}")
        elif p.kind is inspect.Parameter.KEYWORD_ONLY:
            out.append(f"{p.name}={p.name}")
        else:
            out.append(p.name)
    return ", ".join(out)
