"""Sums of squares about a mean: what is summed, and whether the mean is that of the same values by the same weights."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from rewriter.derive.chain import Definition, Shift
from rewriter.derive.factors import (
    Product,
    as_product,
    as_terms,
    depends_on,
    is_running,
    multiply,
    total,
    without_cast,
)
from rewriter.ir import FALSE, Apply, Axis, Const, Node, Ref, Where, const


@dataclass(frozen=True)
class CentredSquare:
    """weights · (value − total / mass)²; the mass is None where it is the number of positions.

    `empty` says of which rows total and mass are NaN, if they are."""

    weights: Product
    value: Node
    total: Ref
    mass: Ref | None
    empty: Node


def centred_square(product: Product, stream: Axis) -> CentredSquare | None:
    """A product with two equal factors x − S / L, where S and L run and x moves along the stream; else None."""
    for factor in product.over:
        found = _less_a_mean(factor, stream) if product.over.count(factor) == 2 else None
        if found:
            rest = [f for f in product.over if f is not factor]
            guards = [(p, [f for f in inside if f is not factor]) for p, inside in product.guards]
            return CentredSquare(Product(rest, product.under, guards), *found)
    return None


def _less_a_mean(factor: Node, stream: Axis) -> tuple[Node, Ref, Ref | None, Node] | None:
    """(x, S, L, p) of x − S / L, or of x − where(p, NaN, S) / where(p, NaN, L)"""
    terms = as_terms(factor)
    running = [t for t in terms if is_running(t.node)]
    value = total([t for t in terms if t not in running])
    if len(running) != 1 or running[0].sign > 0 or not depends_on(value, stream):
        return None
    quotient = without_cast(running[0].node)
    if not (isinstance(quotient, Apply) and quotient.op == "div"):
        return None
    above, below, empty = _of_rows(*map(without_cast, quotient.args))
    if not isinstance(above, Ref) or above.final:
        return None
    if isinstance(below, Ref) and not below.final:
        return value, above, below, empty
    return (value, above, None, empty) if _is_length(below, stream) else None


def _of_rows(above: Node, below: Node) -> tuple[Node, Node, Node]:
    """Both without their NaN in the same rows, and which rows these are."""
    nodes = above, below
    if all(isinstance(n, Where) and n.then is const(math.nan) and n.predicate is above.predicate for n in nodes):
        return above.other, below.other, above.predicate
    return above, below, FALSE


def _is_length(node: Node, stream: Axis) -> bool:
    """Whether a number is how many positions a stream has."""
    if isinstance(node, Const) and isinstance(stream.extent, Const):
        return node.value == stream.extent.value
    return isinstance(node, Apply) and node.op == "cast" and node.args[0] is stream.extent


def is_mean(
    sum_: Definition,
    mass: Definition,
    weights: list[Node],
    value: Node,
    predicate: Node,
    shift: Shift | None,
) -> bool:
    """Whether sum_ / mass is the mean of `value` by the weights, as far as both have run."""
    same = all(d.op == "sum" and d.predicate is predicate and d.shift == shift for d in (sum_, mass))
    return same and _factors(mass.rest) == _factors(weights) and _factors(sum_.rest) == _factors([*weights, value])


def _factors(nodes) -> tuple[Counter, Counter, Node]:
    product = as_product(multiply(list(nodes))) if nodes else Product()
    return Counter(product.over), Counter(product.under), product.predicate
