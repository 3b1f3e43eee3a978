"""Splits reductions where a concatenation ends one piece and begins the next.

max_{i<N+1} where(i < N, s[i], sink)  →  maximum(max_{i<N} s[i], sink)
"""

from __future__ import annotations

from rewriter.ir import (
    Apply,
    Axis,
    Const,
    Index,
    Node,
    Reduce,
    Where,
    apply,
    fresh_axis,
    index,
    open_reduce,
    reduce,
    substitute,
    transform,
    walk,
)
from rewriter.ir.integer import from_poly, plus, proves, to_poly
from rewriter.ir.ops import MONOIDS


def split_concatenations(node: Node) -> Node:
    """Applies the rule to every reduction below `node`, until none is left to split."""
    return transform(node, _split)


def _split(node: Node) -> Node:
    if not isinstance(node, Reduce):
        return node
    axes, predicate, body = open_reduce(node)
    for k, axis in enumerate(axes):
        at = _boundary(axis, body)
        if at is not None:
            others = axes[:k] + axes[k + 1 :]
            pieces = [_piece(node.op, axis, others, predicate, body, *part) for part in _parts(axis, at)]
            return apply(MONOIDS[node.op].combine, *map(_split, pieces))
    return node


def _boundary(axis: Axis, body: Node) -> Node | None:
    """A row-independent position strictly inside the axis at which a `where` changes from one piece to the next."""
    for node in walk(body):
        if (
            isinstance(node, Where)
            and isinstance(node.predicate, Apply)
            and node.predicate.op in ("lt", "le")
        ):
            at = _change(axis, node.predicate)
            if at is not None and proves("lt", Const(0), at) and proves("lt", at, axis.extent):
                if _is_seam(node, axis, at):
                    return at
    return None


def _change(axis: Axis, predicate: Apply) -> Node | None:
    """The first position at which `a < b` (or `a <= b`) differs from its value at 0, for a - b = ±i + constant."""
    gap = plus(to_poly(predicate.args[1]), to_poly(predicate.args[0]), -1)  # holds where gap > 0 (or >= 0)
    slope = gap.pop((Index(axis),), 0)
    rest = from_poly(gap)
    if abs(slope) != 1 or rest.free:
        return None
    strict = predicate.op == "lt"
    if slope < 0:  # rest - i > 0 up to i = rest - 1
        return rest if strict else apply("add", rest, Const(1))
    start = apply("sub", Const(1 if strict else 0), rest)  # i + rest > 0 from i = 1 - rest
    return start


def _is_seam(node: Where, axis: Axis, at: Node) -> bool:
    """Two pieces of a concatenation rather than a mask: a piece of one element, or values on both sides."""
    one = Const(1)
    single = at is one or proves("eq", apply("sub", axis.extent, at), one)
    return single or not (isinstance(node.then, Const) or isinstance(node.other, Const))


def _parts(axis: Axis, at: Node) -> list[tuple[Node, Node]]:
    """(start, length) of the two pieces."""
    return [(Const(0), at), (at, apply("sub", axis.extent, at))]


def _piece(op: str, axis: Axis, others, predicate: Node, body: Node, start: Node, length: Node) -> Node:
    part = fresh_axis(length)
    moved = {axis: apply("add", index(part), start)}
    body, predicate = _settled(substitute(body, moved)), _settled(substitute(predicate, moved))
    return reduce(op, (part, *others), body, predicate)


def _settled(node: Node) -> Node:
    """Rebuilds comparisons, so that those decided by the piece's range become constants."""
    return transform(node, lambda n: n)
