"""The user's signature, and how each traced tensor is reached from it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rewriter.errors import RewriteError
from rewriter.trace import TracedModule


@dataclass(frozen=True)
class Signature:
    """`text` is the parameter list; `leaves` maps placeholders to expressions; `constants` are arguments that must not change, and
    `containers` those that must hold as many."""

    text: str
    leaves: dict[str, str]
    constants: tuple[tuple[str, Any], ...]
    containers: tuple[tuple[str, Any], ...]
    forwarded: str


def signature_of(traced: TracedModule) -> Signature:
    """Raises RewriteError where an argument has no stable expression."""
    function = traced.module.forward if isinstance(traced.module, nn.Module) else traced.module
    signature = inspect.signature(function)
    bound = signature.bind(*traced.args, **traced.kwargs)
    paths = _paths(signature, bound)
    leaves = pytree.tree_leaves((traced.args, traced.kwargs))
    if len(paths) != len(leaves):
        raise RewriteError("arguments that are not passed by name or position")
    tensors = {name: text for name, (text, _) in zip(traced.inputs, paths) if name}
    constants = tuple((text, leaf) for (text, leaf) in paths if not torch.is_tensor(leaf))
    constants += tuple(
        (p.name, p.default)
        for p in signature.parameters.values()
        if p.name not in bound.arguments and p.default is not inspect.Parameter.empty
    )
    containers = tuple(c for name, value in bound.arguments.items() for c in _containers(name, value))
    return Signature(_parameters(signature), tensors, constants, containers, _forwarded(signature))


def _paths(signature: inspect.Signature, bound: inspect.BoundArguments) -> list[tuple[str, Any]]:
    """(expression, value) of every leaf in the order the tracer flattens arguments."""
    out: list[tuple[str, Any]] = []
    for name, value in bound.arguments.items():
        out += _leaves(name, value)
    return out


def _containers(text: str, value: Any) -> list[tuple[str, Any]]:
    """(expression, container) of an argument and what is in it, outermost first."""
    children = pytree.tree_flatten_with_path(value, is_leaf=lambda v: v is not value)[0]
    if not children or children[0][0] == ():
        return [] if children else [(text, value)]
    inner = [c for path, child in children for c in _containers(text + pytree.keystr(path), child)]
    return [(text, value), *inner]


def _leaves(text: str, value: Any) -> list[tuple[str, Any]]:
    return [(text + pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(value)[0]]


def _parameters(signature: inspect.Signature) -> str:
    """The parameters without annotations; defaults that are no plain values become None of the same meaning."""
    plain = []
    for parameter in signature.parameters.values():
        parameter = parameter.replace(annotation=inspect.Parameter.empty)
        default = parameter.default
        if default is not inspect.Parameter.empty and not isinstance(
            default, (int, float, str, bool, type(None), tuple)
        ):
            raise RewriteError(f"the default of {parameter.name} cannot be written down")
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
