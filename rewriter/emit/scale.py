"""Constant factors of values: taken out of an exponent or an extremum they cost one multiplication a row, or none."""

from __future__ import annotations

from rewriter.derive.factors import without_cast
from rewriter.emit.expr import Text, constant, widened
from rewriter.ir import Apply, Const, Node


def without_scale(node: Node) -> tuple[Node, str, list[Node]]:
    """x · c / d → x, "c * (1.0 / d)", [x · c / d, x · c]    of constants above 0; x, "", [] where there are none

    The factor stands in the order of the user's operations. It may be taken out of a maximum: the order of values stays.
    """
    inner, factors, products = without_cast(node), [], []
    while factor := _factor(inner):
        products.append(inner)
        inner = without_cast(factor[0])
        factors.insert(0, factor[1])
    return inner, " * ".join(factors), products


def _factor(node: Node) -> tuple[Node, str] | None:
    """A value and the one constant that it is multiplied by."""
    match node:
        case Apply(op="mul", args=(x, Const() as c)) | Apply(op="mul", args=(Const() as c, x)):
            return (x, constant(c)) if _is_scale(c) else None
        case Apply(op="div", args=(x, Const() as c)):
            return (x, f"(1.0 / {constant(c)})") if _is_scale(c) else None
    return None


def _is_scale(c: Const) -> bool:
    return c.dtype.is_floating_point and 1e-30 < c.value < 1e30


def times(text: Text, scale: str) -> str:
    (wide,) = widened([text], calls=bool(scale))
    return f"{wide.tight(6)} * {scale}" if scale else text.code
