"""Whether a predicate holds anywhere in a tile of rows and stream positions, and whether it holds all over it, told
from what rows have by themselves and what stream positions have by themselves: their least and their greatest.

    ids[m] == ids[n]      anywhere where the two ranges meet, all over where both are the same number
    m - n < w             anywhere where least m - w < greatest n, all over where greatest m - w < least n
    a & b                 anywhere at most where both hold anywhere, all over where both do

A tile may be said to have something where it has nothing, and not to be full where it is; never the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewriter.ir import Apply, Axis, Const, Load, Node, Where, apply, walk
from rewriter.ir.integer import Poly, from_poly, nonnegative, plus, times, to_poly
from rewriter.sparsity.intervals import NEGATED

LEAST, GREATEST = "least", "greatest"  # of what rows have in a tile, or stream positions: ops of these nodes alone


@dataclass(frozen=True)
class Truth:
    """`some`: wherever it does not hold, the predicate holds nowhere in a tile; `every`: where it does, all over it."""

    some: Node
    every: Node


Range = tuple[Node, Node]


def truth_of(predicate: Node, row: Axis, stream: Axis) -> Truth | None:
    """None where it cannot be told without going through the positions of a tile one by one."""
    return _Tile(row, stream).truth(predicate)


class _Tile:
    def __init__(self, row: Axis, stream: Axis):
        self.axes = frozenset((row, stream))
        self.stream = stream

    def truth(self, p: Node) -> Truth | None:
        if len(p.free & self.axes) < 2:
            return Truth(*reversed(self._ends(p)))
        match p:
            case Apply(op="and" | "or" | "bitand" | "bitor" as op, args=(a, b)):
                return self._joined("and" if "and" in op else "or", self.truth(a), self.truth(b))
            case Apply(op="not", args=(a,)):
                return self._negated(self.truth(a))
            case Where(predicate=chosen, then=a, other=b):
                is_chosen, then, other = self.truth(chosen), self.truth(a), self.truth(b)
                one = self._joined("and", is_chosen, then)
                return self._joined("or", one, self._joined("and", self._negated(is_chosen), other))
            case Apply(op=op, args=(a, b)) if op in NEGATED and _is_whole(a) and _is_whole(b):
                return self._compared(op, plus(to_poly(a), to_poly(b), -1))
        return None

    def _ends(self, node: Node) -> Range:
        """The least and the greatest of what has at most one of the two axes."""
        if not node.free & self.axes:
            return node, node
        return Apply(LEAST, (node,), node.dtype), Apply(GREATEST, (node,), node.dtype)

    def _joined(self, op: str, a: Truth | None, b: Truth | None) -> Truth | None:
        return Truth(apply(op, a.some, b.some), apply(op, a.every, b.every)) if a and b else None

    def _negated(self, a: Truth | None) -> Truth | None:
        return Truth(apply("not", a.every), apply("not", a.some)) if a else None

    def _compared(self, op: str, gap: Poly) -> Truth | None:
        """gap op 0, with what the stream has on one side and what rows have on the other: ids may be any numbers, and
        their difference too large for one.
        """
        if op == "ne":
            return self._negated(self._compared("eq", gap))
        of_stream = {m: c for m, c in gap.items() if self._axes_of(m) == {self.stream}}
        of_rows = plus(gap, of_stream, -1)
        if any(c > 0 for c in of_stream.values()):
            sides = self._own(of_stream), self._range(plus({}, of_rows, -1))
        else:
            sides = self._range(of_rows), self._own(plus({}, of_stream, -1))
        return _compared_ranges(op, *sides) if all(sides) else None

    def _axes_of(self, monomial: tuple[Node, ...]) -> set[Axis]:
        return self.axes.intersection(*[frozenset().union(*(n.free for n in monomial))])

    def _own(self, poly: Poly) -> Range | None:
        """Of terms that have at most one of the axes, and the same one."""
        node = from_poly(poly)
        small = any(isinstance(n, Load) and n.dtype not in (torch.int32, torch.int64) for n in walk(node))
        return None if small and not isinstance(node, Load) else self._ends(node)

    def _range(self, poly: Poly) -> Range | None:
        """Of a sum whose terms have either axis, or both."""
        parts: dict[frozenset[Axis], Poly] = {}
        for monomial, factor in poly.items():
            axes = frozenset(self._axes_of(monomial)) or self.axes - {self.stream}  # numbers go with the rows
            parts.setdefault(axes, {})[monomial] = factor
        wide = parts.pop(self.axes, {})
        ranges = [self._own(p) for p in parts.values()] + [self._of_wide(m, c) for m, c in wide.items()]
        if any(r is None for r in ranges):
            return None
        low, high = ranges[0] if ranges else (Const(0), Const(0))
        for least, greatest in ranges[1:]:
            low, high = apply("add", low, least), apply("add", high, greatest)
        return low, high

    def _of_wide(self, monomial: tuple[Node, ...], factor: int) -> Range | None:
        """c · x of a value that has both axes."""
        found = self._atom(monomial[0]) if len(monomial) == 1 else None
        if found is None:
            return None
        low, high = (from_poly(times({(): factor}, to_poly(end))) for end in found)
        return (low, high) if factor > 0 else (high, low)

    def _atom(self, node: Node) -> Range | None:
        match node:
            case Apply(op="abs", args=(x,)) if (inside := self._range(to_poly(x))) is not None:
                low, high = inside
                below = apply("neg", low)
                least = apply("maximum", apply("maximum", low, apply("neg", high)), Const(0))
                return least, apply("maximum", below, high)
            case Apply(op="floordiv", args=(x, d)) if not d.free & self.axes and nonnegative(
                plus(to_poly(d), {(): 1}, -1)
            ):
                inside = self._range(to_poly(x))
                return inside and tuple(apply("floordiv", end, d) for end in inside)
        return None


def _compared_ranges(op: str, left: Range, right: Range) -> Truth:
    (low, high), (least, greatest) = left, right
    match op:
        case "lt" | "le":
            return Truth(apply(op, low, greatest), apply(op, high, least))
        case "gt" | "ge":
            return Truth(apply(op, high, least), apply(op, low, greatest))
    meets = apply("and", apply("le", low, greatest), apply("le", least, high))
    return Truth(meets, apply("and", apply("eq", low, greatest), apply("eq", high, least)))


def _is_whole(node: Node) -> bool:
    return not node.dtype.is_floating_point and node.dtype is not torch.bool
