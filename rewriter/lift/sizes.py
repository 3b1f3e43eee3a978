"""Sizes of the traced graph (sympy expressions over symbols) as integer nodes."""

from __future__ import annotations

import sympy
import torch

from rewriter.ir import Const, Node, Param, apply
from rewriter.lift.values import NotLiftable


def size_node(size: int | torch.SymInt) -> Node:
    """A size as an integer node; symbols become `Param`s by their name."""
    if isinstance(size, torch.SymInt):
        return from_sympy(size.node.expr)
    return Const(int(size))


def shape_of(value: torch.Tensor) -> tuple[Node, ...]:
    return tuple(size_node(s) for s in value.shape)


def from_sympy(expr: sympy.Expr) -> Node:
    """Raises NotLiftable for forms other than + - * // % and whole powers."""
    if expr.is_Integer:
        return Const(int(expr))
    if expr.is_Symbol:
        return Param(expr.name)
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
    raise NotLiftable(f"a size of the form {expr}")


def _fold(op: str, nodes: list[Node]) -> Node:
    out = nodes[0]
    for node in nodes[1:]:
        out = apply(op, out, node)
    return out
