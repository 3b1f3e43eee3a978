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
    """`text` is the parameter list; `leaves` maps placeholders to expressions; `constants` are expressions that must
    not change.
    """

    text: str
    leaves: dict[str, str]
    constants: tuple[tuple[str, Any], ...]
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
    constants = [*_shapes(signature, bound), *((text, leaf) for text, leaf in paths if not torch.is_tensor(leaf))]
    written = tuple((text, _written(text, value)) for text, value in constants)
    return Signature(_parameters(signature), tensors, written, _forwarded(signature))


def _leaves(text: str, value: Any) -> list[tuple[str, Any]]:
    """(expression, value) of every leaf, in the order the tracer flattens arguments."""
    return [(text + pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(value)[0]]


def _shapes(signature: inspect.Signature, bound: inspect.BoundArguments) -> list[tuple[str, Any]]:
    """What must be true of arguments beside their leaves: how many there are, and those left at their default."""
    given = set(bound.arguments)
    bound.apply_defaults()
    out: list[tuple[str, Any]] = []
    for name, value in bound.arguments.items():
        if name in given or signature.parameters[name].kind in _VARIADIC:
            out += _containers(name, value)
        else:
            out.append((name, value))
    return out


def _containers(text: str, value: Any) -> Iterator[tuple[str, Any]]:
    """`len(kv)`, `sorted(options)`: another number of tensors would be another program."""
    if isinstance(value, dict):
        yield f"sorted({text})", sorted(value)
        for key, item in value.items():
            yield from _containers(f"{text}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        yield f"len({text})", len(value)
        for k, item in enumerate(value):
            yield from _containers(f"{text}[{k}]", item)


def _written(text: str, value: Any) -> Any:
    """A value whose repr can be read back. Raises RewriteError where there is none."""
    if not is_plain(value):
        raise RewriteError(f"{text} is a {type(value).__name__}, which a later call's can't be compared with")
    return value if repr(value) == literal(value) else Text(literal(value))


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
