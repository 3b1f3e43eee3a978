"""Sizes of the traced graph (sympy expressions over symbols) as integer nodes."""

from __future__ import annotations

import math
import re

import sympy
import torch
from sympy.printing.precedence import PRECEDENCE
from torch.utils._sympy.functions import OpaqueUnaryFn_exp, OpaqueUnaryFn_log
from torch.utils._sympy.printers import PythonPrinter

from rewriter.errors import RewriteError
from rewriter.ir import Const, Node, Param, apply, cast, const
from rewriter.ir.ops import OPS
from rewriter.ir.printer import show
from rewriter.trace.equations import settled
from rewriter.trace.numbers import LOG2E


class UnknownSize(RewriteError):
    """A size of a form that index arithmetic does not have."""


def size_node(size: int | torch.SymInt) -> Node:
    """A size as an integer node; symbols become `Param`s by their name."""
    if isinstance(size, torch.SymInt):
        return from_sympy(settled(size)[0])
    return Const(int(size))


def shape_of(value: torch.Tensor) -> tuple[Node, ...]:
    return tuple(size_node(s) for s in value.shape)


_OPS = {"FloorDiv": "floordiv", "CleanDiv": "floordiv", "Mod": "mod", "PythonMod": "mod"}
_FOLDED = {"Add": "add", "Mul": "mul", "Min": "minimum", "Max": "maximum"}


def from_sympy(expr: sympy.Expr) -> Node:
    """Raises UnknownSize for forms other than + - * // % min max and whole powers."""
    if expr.is_Integer:
        return Const(int(expr))
    if expr.is_Symbol:
        return Param(expr.name)
    if expr.is_Pow and expr.exp.is_Integer and int(expr.exp) > 0:
        return _fold("mul", [from_sympy(expr.base)] * int(expr.exp))
    name = type(expr).__name__
    above, below = expr.as_numer_denom() if expr.is_Mul or expr.is_Add else (expr, sympy.Integer(1))
    if below != 1:  # a division that leaves nothing
        return apply("floordiv", from_sympy(above), from_sympy(below))
    if name in _FOLDED:
        return _fold(_FOLDED[name], [from_sympy(a) for a in expr.args])
    if name in _OPS:
        return apply(_OPS[name], *map(from_sympy, expr.args))
    raise UnknownSize(f"a size of the form {expr}")


def number_node(number: torch.SymFloat) -> Node:
    """A number made from sizes as a node. Raises UnknownSize."""
    return _number(_named(settled(number)[0]))


def _named(expr: sympy.Basic) -> sympy.Basic:
    """log2(n) / log2(e) → log(n), e ** x → exp(x)"""
    expr = expr.replace(_is_log, lambda e: OpaqueUnaryFn_log(e.args[0].args[0]))
    return expr.replace(_is_exp, lambda e: OpaqueUnaryFn_exp(e.args[1]))


def _is_log(expr: sympy.Basic) -> bool:
    is_log2 = bool(expr.args) and type(expr.args[0]).__name__ == "OpaqueUnaryFn_log2"
    return is_log2 and type(expr).__name__ == "FloatTrueDiv" and expr.args[1] == LOG2E


def _is_exp(expr: sympy.Basic) -> bool:
    return type(expr).__name__ == "FloatPow" and expr.args[0] == math.e


_OF_NUMBERS = {"FloatPow": "pow", "FloatTrueDiv": "div", "IntTrueDiv": "div", "Add": "add", "Mul": "mul"}
_OF_NUMBERS |= {"Min": "minimum", "Max": "maximum"}


def _number(expr: sympy.Expr) -> Node:
    """float(s) ** 0.5  →  pow(float32(s), 0.5)"""
    name = type(expr).__name__
    if expr.is_Float:
        return const(float(expr))
    if name == "ToFloat" or expr.is_integer:
        return cast(from_sympy(expr.args[0] if name == "ToFloat" else expr), torch.float32)
    if name in _OF_NUMBERS:
        return _fold(_OF_NUMBERS[name], [_number(a) for a in expr.args])
    if name.startswith("OpaqueUnaryFn_") and name.removeprefix("OpaqueUnaryFn_") in OPS:
        return apply(name.removeprefix("OpaqueUnaryFn_"), _number(expr.args[0]))
    raise UnknownSize(f"a number of the form {expr}")


class _Numbers(PythonPrinter):
    """Numbers made from sizes as people write them: `length**0.5`, not `torch.sym_float(length) **
    0.5000000000000000`.
    """

    def _print_ToFloat(self, expr: sympy.Expr) -> str:
        return self.parenthesize(expr.args[0], PRECEDENCE["Pow"] + 1)

    def _print_Float(self, expr: sympy.Float) -> str:
        return repr(float(expr))

    def _print_FloatPow(self, expr: sympy.Expr) -> str:
        base, power = (self.parenthesize(a, PRECEDENCE["Pow"] + 1) for a in expr.args)
        return f"{base}**{power}"

    def _print_OpaqueUnaryFn_sqrt(self, expr: sympy.Expr) -> str:
        return f"{self.parenthesize(expr.args[0], PRECEDENCE['Pow'] + 1)}**0.5"

    def _print_OpaqueUnaryFn_log(self, expr: sympy.Expr) -> str:
        return f"math.log({self._print(expr.args[0])})"

    def _print_OpaqueUnaryFn_exp(self, expr: sympy.Expr) -> str:
        return f"math.exp({self._print(expr.args[0])})"


def number_text(number: torch.SymInt | torch.SymFloat, names: dict[str, str]) -> str:
    """A number made from sizes as Python, symbols by what `names` calls them."""
    return renamed(_Numbers().doprint(_named(settled(number)[0])), names)


def sizes_in(number: torch.SymInt | torch.SymFloat) -> tuple[Param, ...]:
    """The sizes that a number is made from."""
    return tuple(Param(s.name) for s in sorted(settled(number)[0].free_symbols, key=str))


_RELATIONS = {"Equality": "==", "Unequality": "!="}


def relation_text(condition: sympy.Basic, names: dict[str, str]) -> str:
    """A condition on sizes as Python, symbols by what `names` calls them."""
    try:
        relation = _RELATIONS.get(type(condition).__name__) or condition.rel_op
        text = f"{show(from_sympy(condition.lhs))} {relation} {show(from_sympy(condition.rhs))}"
    except (UnknownSize, AttributeError):
        text = _Numbers().doprint(_named(condition))
    return renamed(text, names)


def renamed(text: str, names: dict[str, str]) -> str:
    """Words replaced by what `names` calls them."""
    return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), text)


def _fold(op: str, nodes: list[Node]) -> Node:
    out = nodes[0]
    for node in nodes[1:]:
        out = apply(op, out, node)
    return out
