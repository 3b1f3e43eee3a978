"""Splits reductions where a concatenation ends one piece and begins the next.

    max_{i<N+1} where(i < N, s[i], sink)  →  maximum(max_{i<N} s[i], sink)
"""

from __future__ import annotations

from rewriter.ir import Apply, Axis, Const, Index, Node, Reduce, Where, apply, fresh_axis, index, open_reduce, reduce
from rewriter.ir import substitute, transform, walk
from rewriter.ir.integer import proves
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
    """A row-independent position strictly inside the axis at which some `where` changes its branch."""
    for node in walk(body):
        if isinstance(node, Where) and isinstance(node.predicate, Apply) and node.predicate.op == "lt":
            left, right = node.predicate.args
            if left is Index(axis) and not right.free and proves("lt", Const(0), right) and proves("lt", right, axis.extent):
                return right
    return None


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
