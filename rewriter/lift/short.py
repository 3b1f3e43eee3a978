"""Short truth values over a fixed axis are written out: any of three offsets."""

from __future__ import annotations

from rewriter.ir import TRUE, Const, Node, Reduce, apply, open_reduce, substitute, walk
from rewriter.ir.ops import MONOIDS

LONGEST = 16  # elements of a reduction that is written out


def unroll_short(node: Node) -> Node:
    """any_{k<3} (i - j == o[k])  →  (i - j == o[0]) | (i - j == o[1]) | (i - j == o[2])"""
    if not isinstance(node, Reduce) or not _is_short(node):
        return node
    (axis,), predicate, body = open_reduce(node)
    if predicate is not TRUE:
        return node
    terms = [substitute(body, {axis: Const(k)}) for k in range(int(axis.extent.value))]
    out = terms[0]
    for term in terms[1:]:
        out = apply(MONOIDS[node.op].combine, out, term)
    return out


def _is_short(node: Reduce) -> bool:
    """A truth value over one fixed axis, nothing nested: part of a predicate, never of a chain."""
    if len(node.axes) != 1 or not isinstance(node.axes[0].extent, Const):
        return False
    nested = any(isinstance(n, Reduce) for n in walk(node.body))
    return node.op in ("any", "all") and 0 < node.axes[0].extent.value <= LONGEST and not nested
