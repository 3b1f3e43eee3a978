"""Sizes of the traced graph (sympy expressions over symbols) as integer nodes."""

from __future__ import annotations

import sympy
import torch

from rewriter.ir import Const, Node, Param, apply


class UnknownSize(Exception):
    """A size of a form that index arithmetic does not have."""


def size_node(size: int | torch.SymInt) -> Node:
    """A size as an integer node; symbols become `Param`s by their name."""
    if isinstance(size, torch.SymInt):
        return from_sympy(size.node.expr)
    return Const(int(size))


def shape_of(value: torch.Tensor) -> tuple[Node, ...]:
    return tuple(size_node(s) for s in value.shape)


def from_sympy(expr: sympy.Expr) -> Node:
    """Raises UnknownSize for forms other than + - * // % and whole powers."""
    if expr.is_Integer:
        return Const(int(expr))
    if expr.is_Symbol:
        return Param(expr.name)
    if type(expr).__name__ in ("Min", "Max"):
        return from_sympy(clamped(expr)[0])
    args = [from_sympy(a) for a in expr.args] if not expr.is_Pow else []
    name = type(expr).__name__
    if expr.is_Pow and expr.exp.is_Integer and int(expr.exp) > 0:
        return _fold("mul", [from_sympy(expr.base)] * int(expr.exp))
    if expr.is_Add or expr.is_Mul:
        return _fold("add" if expr.is_Add else "mul", args)
    if name in ("FloorDiv", "CleanDiv"):
        return apply("floordiv", *args)
    if name in ("Mod", "PythonMod"):
        return apply("mod", *args)
    raise UnknownSize(f"a size of the form {expr}")


def clamped(expr: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Min(128, s) → (s, s ≤ 128): a buffer's slice is taken to be as long as asked; the condition is guarded."""
    symbolic = [a for a in expr.args if not a.is_Integer]
    numbers = [a for a in expr.args if a.is_Integer]
    if len(symbolic) != 1 or len(numbers) != 1:
        raise UnknownSize(f"a size of the form {expr}")
    relation = sympy.Le if type(expr).__name__ == "Min" else sympy.Ge
    return symbolic[0], relation(symbolic[0], numbers[0])


def _fold(op: str, nodes: list[Node]) -> Node:
    out = nodes[0]
    for node in nodes[1:]:
        out = apply(op, out, node)
    return out
