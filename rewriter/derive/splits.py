"""Splits reductions where a concatenation ends one piece and begins the next.

max_{i<N+1} where(i < N, s[i], sink)  →  maximum(max_{i<N} s[i], sink)
"""

from __future__ import annotations

from collections.abc import Iterator

from rewriter.ir import (
    Apply,
    Axis,
    Const,
    Index,
    Load,
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
from rewriter.ir.build import is_int
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
        others = axes[:k] + axes[k + 1 :]
        for at in _boundaries(axis, body):
            parts = _parts(axis, at)
            pieces = [_piece(node.op, axis, others, predicate, body, *part) for part in parts]
            lone = [piece for piece, (_, length) in zip(pieces, parts) if length is Const(1)]
            if not any(_contracts(piece, body) for piece in lone):
                return apply(MONOIDS[node.op].combine, *map(_split, pieces))
    return node


def _contracts(piece: Node, body: Node) -> bool:
    """One element that is a contraction still: better computed with the tile that it is the edge of."""
    return any(isinstance(n, Reduce) for n in set(walk(piece)) - set(walk(body)))


def _boundaries(axis: Axis, body: Node) -> Iterator[Node]:
    """Row-independent positions strictly inside the axis at which a `where` changes from one piece to the next."""
    for node in walk(body):
        if isinstance(node, Where) and _compares_positions(node.predicate):
            at = _change(axis, node.predicate)
            if at is not None and proves("lt", Const(0), at) and proves("lt", at, axis.extent):
                if _is_seam(node, axis, at):
                    yield at


def _compares_positions(predicate: Node) -> bool:
    """Whether it is `a < b` (or `a <= b`) of whole numbers."""
    return isinstance(predicate, Apply) and predicate.op in ("lt", "le") and all(map(is_int, predicate.args))


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
    """Two pieces of a concatenation rather than a mask: values on both sides, or one element that ends what is read."""
    single = at is Const(1) or proves("eq", apply("sub", axis.extent, at), Const(1))
    has_values = not (isinstance(node.then, Const) or isinstance(node.other, Const))
    return has_values or (single and _reads_beyond(node, axis))


def _reads_beyond(node: Where, axis: Axis) -> bool:
    """Whether a tensor is read at positions along the axis that it does not have: the other piece's."""
    loads = (n for n in walk(node.then, node.other) if isinstance(n, Load) and axis in n.free)
    return any(
        axis in entry.free and not (proves("le", Const(0), entry) and proves("lt", entry, extent))
        for load in loads
        for entry, extent in zip(load.index, load.tensor.shape)
        if not any(isinstance(n, Load) for n in walk(entry))
    )


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
