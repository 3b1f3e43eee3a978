"""Rows of several axes as rows of one: pixels of a group of channels, in the order in which they lie in memory.

sum_{c, h, w} x[b, 16·g + c, h, w]  →  sum_i x'[b, g, i]   where x' is x seen as [B, G, 16·H·W]
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rewriter.ir import (
    Const,
    Index,
    Load,
    Node,
    Param,
    Reduce,
    apply,
    fresh_axis,
    index,
    open_reduce,
    reduce,
    substitute,
    transform,
    walk,
)
from rewriter.ir.integer import product, proves
from rewriter.lift.values import Lifted, fresh_axes, positions
from rewriter.lift.views import reshaped


@dataclass(frozen=True)
class Flat:
    """A tensor's shape with its row as one dimension, the `row`-th.

    Other tensors of as many elements are read in that shape, too."""

    shape: tuple[Node, ...]
    row: int

    def of(self, value: Lifted, is_wide: bool) -> Lifted:
        """A value by rows and position, or by rows alone."""
        shape = self.shape if is_wide else (*self.shape[: self.row], *self.shape[self.row + 1 :])
        axes = fresh_axes(shape)
        by = dict(zip(value.axes, reshaped(value.shape, shape, positions(axes))))
        merged = transform(substitute(value.body, by), _with_one_axis)
        return Lifted(axes, transform(merged, self._seen))

    def _seen(self, node: Node) -> Node:
        """x[b, 16·g + i // HW, i // W % H, i % W]  →  x'[b, g, i]"""
        if not isinstance(node, Load) or not proves("eq", product(node.tensor.shape), product(self.shape)):
            return node
        entries = tuple(reshaped(self.shape, node.tensor.shape, node.index))
        if node.tensor.shape == self.shape or not all(isinstance(e, (Index, Const)) for e in entries):
            return node
        return Load(
            replace(node.tensor, shape=self.shape, given=node.tensor.given or node.tensor.shape, lanes=None),
            entries,
        )


def flat_of(shape: tuple[Node, ...], lengths: dict[int, Node]) -> Flat | None:
    """The shape with the dimensions that run along a row as one; None where they do not lie together.

    lengths: how far a row runs along each. The first may be the row's in part: what is left of it tells rows apart.
    """
    first, last = min(lengths), max(lengths)
    parts = [apart for apart in (apply("floordiv", shape[first], lengths[first]),) if apart is not Const(1)]
    if not _lie_together(shape, lengths):
        return None
    found = (*shape[:first], *parts, product(lengths.values()), *shape[last + 1 :])
    return Flat(found, first + len(parts)) if proves("eq", product(found), product(shape)) else None


def undecided(shape: tuple[Node, ...], lengths: dict[int, Node]) -> frozenset[Param]:
    """Sizes that must be known to see that a part of a dimension divides it: C, of x[b, C // 4 * g + c]"""
    return frozenset(n for n in walk(shape[min(lengths)]) if isinstance(n, Param) and _lie_together(shape, lengths))


def _lie_together(shape: tuple[Node, ...], lengths: dict[int, Node]) -> bool:
    """Whether a row runs along the whole of all its dimensions but the first, and these follow one another."""
    first, last = min(lengths), max(lengths)
    return sorted(lengths) == list(range(first, last + 1)) and all(shape[d] is lengths[d] for d in lengths if d > first)


def _with_one_axis(node: Node) -> Node:
    """sum_{c, h} x[c, h]  →  sum_i x[i // H, i % H]"""
    if not isinstance(node, Reduce) or len(node.axes) == 1:
        return node
    axes, predicate, body = open_reduce(node)
    extents = tuple(a.extent for a in axes)
    row = fresh_axis(product(extents))
    by = dict(zip(axes, reshaped(extents, (row.extent,), (index(row),))))
    return reduce(node.op, (row,), substitute(body, by), substitute(predicate, by))
