"""What the patched forward checks before it trusts the kernels: as conditions, each with the cause it names."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import sympy
import torch
from torch import nn

from rewriter.errors import RewriteError
from rewriter.ir import Const, Node, Param
from rewriter.ir.printer import show
from rewriter.patch.forward import attribute_path
from rewriter.patch.signature import Signature
from rewriter.trace import TracedModule
from rewriter.trace.sizes import from_sympy, shape_of


@dataclass(frozen=True)
class Guard:
    """Python text that is true where the kernels apply, and what to say where it is not."""

    condition: str
    cause: str


def tensors_of(traced: TracedModule) -> dict[str, str]:
    """(dtype, shape) of the parameters and buffers that are read, as source text by path."""
    return {a.path: _kind(traced, name) for name, a in traced.attributes.items() if a.is_registered}


def values_of(traced: TracedModule, called: frozenset[str]) -> dict[str, str]:
    """The plain values that forward read, as source text by path, but for those of submodules that are `called` as they are."""
    read = traced.state.read.items()
    return {path: _literal(v) for path, v in read if path != "training" and not _is_below(path, called)}


def _kind(traced: TracedModule, name: str) -> str:
    held = traced.placeholders[name].meta["val"]
    return _literal((held.dtype, tuple(held.shape)))


def _is_below(path: str, modules: frozenset[str]) -> bool:
    return any(path.startswith(f"{module}.") for module in modules)


def _literal(value: object) -> str:
    """Source text of a plain value."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_literal, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
    return repr(value)


def guards_of(traced: TracedModule, signature: Signature, called: frozenset[str]) -> tuple[Guard, ...]:
    """Arguments, training mode, hooks, attributes that are not there, dtypes, ranks and sizes that tracing assumed."""
    out = [_container(text, value) for text, value in signature.containers]
    out += [Guard(_same(text, value), f"{text} is not {value!r}") for text, value in signature.constants]
    if isinstance(traced.module, nn.Module):
        training = traced.module.training
        out.append(
            Guard(
                f"self.training is {training}", f"the module is {'not ' if training else ''}in training mode"
            )
        )
    out += [_loose(a.path, _kind(traced, name)) for name, a in traced.attributes.items() if not a.is_registered]
    out += _hooks(traced, called)
    out += [_absent(path) for path in sorted(traced.state.absent) if not _is_below(path, called)]
    first: dict[Node, str] = {}
    for name, text in signature.leaves.items():
        out += _tensor_guards(traced.placeholders[name].meta["val"], text, first)
    out += _autocast(traced, signature)
    out += _conditions(traced, first)
    return tuple(out)


def _loose(path: str, kind: str) -> Guard:
    """A tensor that is no parameter or buffer may be on another device than these."""
    return Guard(f"_is_tensor(_held(self, {path!r}), *{kind})", f"self.{path} is no {kind}")


def _hooks(traced: TracedModule, called: frozenset[str]) -> list[Guard]:
    """Submodules whose forward is written out are not called: a hook on one would not run."""
    if not isinstance(traced.module, nn.Module):
        return []
    stacks = [n.meta.get("nn_module_stack") or {} for n in traced.graph.nodes]
    used = {path for stack in stacks for path, _ in stack.values() if path}
    paths = [path for path, _ in traced.module.named_modules() if path in used and not _is_below(f"{path}.", called)]
    inside = [attribute_path(p) for p in paths]
    if not inside:
        return []
    text = f"any(m._forward_hooks or m._forward_pre_hooks for m in ({', '.join(inside)},))"
    return [Guard(f"not {text}", "a submodule has hooks")]


def _absent(path: str) -> Guard:
    owner, _, name = path.rpartition(".")
    text = attribute_path(owner) if owner else "self"
    return Guard(f"not hasattr({text}, {name!r})", f"{text} has {name!r}")


def _autocast(traced: TracedModule, signature: Signature) -> list[Guard]:
    """What forward casts by itself depends on the device: tracing wrote that of its own device down."""
    out = []
    for name, text in list(signature.leaves.items())[:1]:
        here = traced.placeholders[name].meta["val"].device.type
        for device in sorted(traced.autocast):
            relation = "==" if device == here else "!="
            out.append(Guard(f'{text}.device.type {relation} "{device}"', f"it autocasts on {device} and was traced on {here}"))
    return out


def _container(text: str, value: object) -> Guard:
    kind = type(value).__name__
    if isinstance(value, dict):
        keys = ", ".join(map(repr, value)) if value else "*()"
        return Guard(f"type({text}).__name__ == {kind!r} and {text}.keys() == {{{keys}}}", f"{text} is no {kind} of {keys}")
    return Guard(f"type({text}).__name__ == {kind!r} and len({text}) == {len(value)}", f"{text} is no {kind} of {len(value)}")


def _same(text: str, value: object) -> str:
    return f"{text} is {value!r}" if value is None or isinstance(value, bool) else f"{text} == {value!r}"


def _tensor_guards(value: torch.Tensor, text: str, first: dict[Node, str]) -> list[Guard]:
    out = [
        Guard(f"isinstance({text}, torch.Tensor)", f"{text} is no tensor"),
        Guard(f"{text}.dtype is {value.dtype}", f"{text} is not {value.dtype}"),
        Guard(f"{text}.dim() == {value.dim()}", f"{text} has not {value.dim()} dimensions"),
    ]
    for k, extent in enumerate(shape_of(value)):
        here = f"{text}.shape[{k}]"
        if isinstance(extent, Const):
            out.append(Guard(f"{here} == {extent.value}", f"{here} is not {extent.value}"))
        elif extent in first:
            out.append(Guard(f"{here} == {first[extent]}", f"{here} differs from {first[extent]}"))
        else:
            first[extent] = here
    return out


_RELATIONS = {"Eq": "==", "Ne": "!="}


def _conditions(traced: TracedModule, first: dict[Node, str]) -> list[Guard]:
    """The user's own branches on sizes, as they were taken."""
    out = []
    for condition in traced.conditions:
        relation = _RELATIONS.get(type(condition).__name__, getattr(condition, "rel_op", ""))
        text = f"{_text(condition.lhs, first)} {relation} {_text(condition.rhs, first)}"
        out.append(Guard(text, f"{text} does not hold"))
    return out


def _text(expr: sympy.Expr, first: dict[Node, str]) -> str:
    text = show(from_sympy(expr))
    for symbol in expr.free_symbols:
        if Param(symbol.name) not in first:
            raise RewriteError(f"a branch on a size ({symbol}) that no input has")
        text = re.sub(rf"\b{symbol.name}\b", first[Param(symbol.name)], text)
    return text
