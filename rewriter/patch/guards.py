"""What the patched forward checks before it trusts the kernels: as conditions, each with the cause it names."""

from __future__ import annotations

import re
from dataclasses import dataclass

import sympy
import torch
from torch import nn

from rewriter.errors import RewriteError
from rewriter.ir import Const, Node, Param
from rewriter.ir.printer import show
from rewriter.patch.signature import Signature
from rewriter.trace import TracedModule
from rewriter.trace.sizes import from_sympy, shape_of


@dataclass(frozen=True)
class Guard:
    """Python text that is true where the kernels apply, and what to say where it is not."""

    condition: str
    cause: str


def guards_of(traced: TracedModule, signature: Signature) -> tuple[Guard, ...]:
    """Arguments, training mode, dtypes, ranks and sizes that tracing assumed."""
    out = [Guard(_same(text, value), f"{text} is not {value!r}") for text, value in signature.constants]
    if isinstance(traced.module, nn.Module):
        training = traced.module.training
        out.append(
            Guard(
                f"self.training is {training}", f"the module is {'not ' if training else ''}in training mode"
            )
        )
    first: dict[Node, str] = {}
    for name, text in signature.leaves.items():
        out += _tensor_guards(traced.placeholders[name].meta["val"], text, first)
    out += _conditions(traced, first)
    return tuple(out)


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
