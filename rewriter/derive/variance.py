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
    quotient,
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
    """A product with two equal factors c·x − c·S / L, where S and L run and x moves along the stream; else None."""
    for factor in product.over:
        found = _less_a_mean(factor, stream) if product.over.count(factor) == 2 else None
        if found:
            scale, *parts = found
            rest = [f for f in product.over if f is not factor] + [const(scale * scale)] * (scale != 1)
            guards = [(p, [f for f in inside if f is not factor]) for p, inside in product.guards]
            return CentredSquare(Product(rest, product.under, guards), *parts)
    return None


def _less_a_mean(factor: Node, stream: Axis) -> tuple[float, Node, Ref, Ref | None, Node] | None:
    """(c, x, S, L, p) of c·x − c·S / L, or of x − where(p, NaN, S) / where(p, NaN, L)"""
    terms = as_terms(factor)
    running = [t for t in terms if is_running(t.node)]
    value = total([t for t in terms if t not in running])
    if len(running) != 1 or running[0].sign > 0 or not depends_on(value, stream):
        return None
    scale, value = _scaled(value)
    mean_scale, mean = _scaled(running[0].node)
    above, below = mean.args if isinstance(mean, Apply) and mean.op == "div" else (mean, const(1.0))
    above, below, empty = _of_rows(without_cast(above), without_cast(below))
    if not isinstance(above, Ref) or above.final:
        return None
    if isinstance(below, Ref) and not below.final:
        return (scale, value, above, below, empty) if _same(scale, mean_scale) else None
    if isinstance(stream.extent, Const):  # the length is among the constants
        is_mean_of_all = below is const(1.0) and _same(scale, mean_scale * stream.extent.value)
    else:
        is_mean_of_all = _is_length(below, stream) and _same(scale, mean_scale)
    return (scale, value, above, None, empty) if is_mean_of_all else None


def _scaled(node: Node) -> tuple[float, Node]:
    """(c, x) of c·x"""
    product = as_product(node)
    if product.guards:
        return 1.0, node
    above, below = ([f.value for f in side if isinstance(f, Const)] for side in (product.over, product.under))
    over, under = ([f for f in side if not isinstance(f, Const)] for side in (product.over, product.under))
    scale = math.prod(map(float, above)) / math.prod(map(float, below))
    return scale, quotient(over, under)


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-12)


def _of_rows(above: Node, below: Node) -> tuple[Node, Node, Node]:
    """Both without their NaN in the same rows, and which rows these are."""
    nodes = above, below
    if all(isinstance(n, Where) and n.then is const(math.nan) and n.predicate is above.predicate for n in nodes):
        return above.other, below.other, above.predicate
    return above, below, FALSE


def _is_length(node: Node, stream: Axis) -> bool:
    """Whether a number is how many positions a stream has."""
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
