"""Sizes of the traced graph (sympy expressions over symbols) as integer nodes."""

from __future__ import annotations

import re
from functools import lru_cache

import sympy
import torch
from torch.utils._sympy.printers import PythonPrinter

from rewriter.errors import RewriteError
from rewriter.ir import Const, Node, Param, apply
from rewriter.ir.printer import show


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
    if name in _FOLDED:
        return _fold(_FOLDED[name], [from_sympy(a) for a in expr.args])
    if name in _OPS:
        return apply(_OPS[name], *map(from_sympy, expr.args))
    raise UnknownSize(f"a size of the form {expr}")


_RELATIONS = {"Equality": "==", "Unequality": "!="}


def relation_text(condition: sympy.Basic, names: dict[str, str]) -> str:
    """A condition on sizes as Python, symbols by what `names` calls them. Raises UnknownSize."""
    try:
        relation = _RELATIONS.get(type(condition).__name__) or condition.rel_op
        text = f"{show(from_sympy(condition.lhs))} {relation} {show(from_sympy(condition.rhs))}"
    except (UnknownSize, AttributeError):
        text = PythonPrinter().doprint(condition)
    if "math." in text:
        raise UnknownSize(f"a condition of the form {condition}")
    return renamed(text, names)


def renamed(text: str, names: dict[str, str]) -> str:
    """Words replaced by what `names` calls them."""
    return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), text)


def settled(size: torch.SymInt) -> tuple[sympy.Expr, list[sympy.Expr]]:
    """A size with what the program needs to be equal written as one, and the equations used for that.

    A buffer's slice is as long as asked, or as the buffer: Min(128, s) → s, [Min(128, s) = s], where it is added to a
    tensor of s."""
    expr, used = size.node.expr, []
    for old, new in _equations(size.node.shape_env):
        if expr.has(old):
            expr = expr.xreplace({old: new})
            used.append(sympy.Eq(old, new, evaluate=False))
    return expr, used


@lru_cache(maxsize=4)
def _equations(environment) -> tuple[tuple[sympy.Expr, sympy.Expr], ...]:
    """(longer, shorter) sides of the equalities between sizes that torch asked for and could not solve for a symbol."""
    found = [environment.replace(g.expr) for g in environment.guards if isinstance(g.expr, sympy.Eq)]
    sides = [
        sorted(equation.args, key=lambda side: (-sympy.count_ops(side), str(side)))
        for equation in found
        if isinstance(equation, sympy.Eq)
    ]
    return tuple(dict.fromkeys((old, new) for old, new in sides if _is_choice(old) and not new.is_number))


def _is_choice(expr: sympy.Expr) -> bool:
    """A size that is one of several, or a sum with such a one."""
    return not expr.is_Mul and any(type(e).__name__ in ("Min", "Max") for e in sympy.preorder_traversal(expr))


def _fold(op: str, nodes: list[Node]) -> Node:
    out = nodes[0]
    for node in nodes[1:]:
        out = apply(op, out, node)
    return out
