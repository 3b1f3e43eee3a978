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
        return from_sympy(decided(size)[0])
    return Const(int(size))


def shape_of(value: torch.Tensor) -> tuple[Node, ...]:
    return tuple(size_node(s) for s in value.shape)


def from_sympy(expr: sympy.Expr) -> Node:
    """Raises UnknownSize for forms other than + - * // % and whole powers."""
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
    raise UnknownSize(f"a size of the form {expr}")


def decided(size: torch.SymInt) -> tuple[sympy.Expr, list[sympy.Expr]]:
    """A size without Min and Max, and what must hold for that: Min(128, s) → (s, [s ≤ 128]) where s was traced as 37.

    A buffer's slice is as long as asked, or as the buffer: whichever it was when traced, the condition is guarded."""
    expr, conditions = size.node.expr, []
    known = _hints(size.node.shape_env)
    for node in sorted(set(sympy.preorder_traversal(expr)), key=str):
        if type(node).__name__ in ("Min", "Max") and len(node.args) == 2:
            first, second = sorted(node.args, key=lambda e: int(e.subs(known)))
            chosen, relation = (first, sympy.Le(first, second)) if type(node).__name__ == "Min" else (second, sympy.Ge(second, first))
            expr = expr.xreplace({node: chosen})
            conditions.append(relation)
    return expr, conditions


def _hints(environment) -> dict[sympy.Symbol, int]:
    """The traced value of every symbol; torch has renamed the table."""
    for name in ("backed_var_to_val", "var_to_val"):
        table = getattr(environment, name, None)
        if table:
            return dict(table)
    return {}


def _fold(op: str, nodes: list[Node]) -> Node:
    out = nodes[0]
    for node in nodes[1:]:
        out = apply(op, out, node)
    return out
