"""Where along a stream a predicate holds, as intervals whose ends depend on rows and grid alone.

    n < m + 1                       n in [.., m + 1)
    m - w < n & n <= m              n in [m - w + 1, m + 1)
    n < lengths[b]                  n in [.., lengths[b])
    n <= m | n < prefix             n in [.., max(m + 1, prefix))
    n // 64 == m // 64              n in [64 * (m // 64), 64 * (m // 64) + 64)
    n <= m & ids[m] == ids[n]       at most [.., m + 1), nowhere for sure

Of a tile of rows the loop runs over the hull of their intervals, and needs no mask where all of them hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewriter.ir import FALSE, TRUE, Apply, Axis, Const, Index, Node, Where, where
from rewriter.ir.integer import Poly, extremum, floordiv, from_poly, nonnegative, plus, times, to_poly

NEGATED = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}
ONE: Poly = {(): 1}


@dataclass(frozen=True)
class Interval:
    """lower ≤ n < upper, each an integer node; None: no end on that side."""

    lower: Node | None = None
    upper: Node | None = None

    def meet(self, other: Interval) -> Interval:
        return Interval(_both("maximum", self.lower, other.lower), _both("minimum", self.upper, other.upper))

    def hull(self, other: Interval) -> Interval:
        return Interval(_either("minimum", self.lower, other.lower), _either("maximum", self.upper, other.upper))

    def joins(self, other: Interval) -> bool:
        """Whether the hull is no more than the two: they are open on the same side."""
        return (self.lower is other.lower is None) or (self.upper is other.upper is None)


ALL = Interval()
NOTHING = Interval(None, Const(0))


@dataclass(frozen=True)
class Support:
    """At most at `outer` positions does a predicate hold, and at all of `inner`; None where no such are known."""

    outer: Interval
    inner: Interval | None

    def meet(self, other: Support) -> Support:
        inner = self.inner.meet(other.inner) if self.inner and other.inner else None
        return Support(self.outer.meet(other.outer), inner)

    def union(self, other: Support) -> Support:
        """Where one of two predicates holds."""
        outer = self.outer.hull(other.outer)
        if self.inner is None or other.inner is None:
            return Support(outer, self.inner or other.inner)
        return Support(outer, self.inner.hull(other.inner) if self.inner.joins(other.inner) else self.inner)


EVERYWHERE = Support(ALL, ALL)
NOWHERE = Support(NOTHING, NOTHING)
UNKNOWN = Support(ALL, None)


def union(supports: list[Support]) -> Support:
    """What a loop needs that several predicates share: all that one of them takes; no mask where none has one."""
    outer, inner = supports[0].outer, supports[0].inner
    for support in supports[1:]:
        outer = outer.hull(support.outer)
        inner = inner.meet(support.inner) if inner and support.inner else None
    return Support(outer, inner)


def support_of(predicate: Node, stream: Axis) -> Support:
    """At any position of the axes but the stream."""
    if predicate is TRUE:
        return EVERYWHERE
    if predicate is FALSE:
        return NOWHERE
    if stream not in predicate.free:
        end = where(predicate, stream.extent, Const(0))
        return Support(Interval(None, end), Interval(None, end))
    match predicate:
        case Apply(op="and" | "bitand", args=(a, b)) if predicate.dtype is torch.bool:
            return support_of(a, stream).meet(support_of(b, stream))
        case Apply(op="or" | "bitor", args=(a, b)) if predicate.dtype is torch.bool:
            return support_of(a, stream).union(support_of(b, stream))
        case Apply(op="not", args=(a,)):
            return support_of(negated(a), stream) if negated(a) is not predicate else UNKNOWN
        case Where(predicate=p, then=a, other=b):
            chosen = support_of(p, stream).meet(support_of(a, stream))
            return chosen.union(support_of(negated(p), stream).meet(support_of(b, stream)))
        case Apply(op=op, args=(a, b)) if op in NEGATED and _is_whole(a) and _is_whole(b):
            return _compared(op, plus(to_poly(a), to_poly(b), -1), stream)
    return UNKNOWN


def negated(predicate: Node) -> Node:
    """not (a < b) → a >= b        not (a & b) → not a | not b"""
    match predicate:
        case Const():
            return FALSE if predicate is TRUE else TRUE
        case Apply(op="not", args=(a,)):
            return a
        case Apply(op=op, args=args) if op in NEGATED and all(map(_is_whole, args)):
            return Apply(NEGATED[op], args, torch.bool)
        case Apply(op="and" | "or" as op, args=(a, b)):
            return Apply("or" if op == "and" else "and", (negated(a), negated(b)), torch.bool)
    return Apply("not", (predicate,), torch.bool)


def _is_whole(node: Node) -> bool:
    return not node.dtype.is_floating_point and node.dtype is not torch.bool


def _compared(op: str, gap: Poly, stream: Axis) -> Support:
    """Where `gap op 0`."""
    match op:
        case "le":
            return _below(plus(gap, ONE, -1), stream)
        case "gt":
            return _below(plus({}, gap, -1), stream)
        case "ge":
            return _below(plus(plus({}, gap, -1), ONE, -1), stream)
        case "eq":
            return _compared("le", gap, stream).meet(_compared("ge", gap, stream))
        case "ne":
            return _compared("lt", gap, stream).union(_compared("gt", gap, stream))
    return _below(gap, stream)


def _below(gap: Poly, stream: Axis) -> Support:
    """Where gap < 0: solved for the stream, through |x| and x // d, where it is in one term."""
    moving = {m: c for m, c in gap.items() if any(stream in atom.free for atom in m)}
    rest = plus(gap, moving, -1)
    if len(moving) != 1:
        return UNKNOWN
    ((monomial, factor),) = moving.items()
    if len(monomial) != 1:
        return UNKNOWN
    match monomial[0]:
        case Index(axis=axis) if axis == stream:
            return _solved(factor, rest)
        case Apply(op="abs", args=(x,)):
            return _both_ways(to_poly(x), factor, rest, stream)
        case Apply(op="floordiv", args=(x, d)) if abs(factor) == 1 and nonnegative(plus(to_poly(d), ONE, -1)):
            return _below(_multiplied(to_poly(x), to_poly(d), factor, rest), stream)
    return UNKNOWN


def _solved(factor: int, rest: Poly) -> Support:
    """c·n + r < 0  →  n < ⌈-r / c⌉;  r - c·n < 0  →  n > r / c"""
    if factor > 0:
        end = floordiv(from_poly(plus({(): factor - 1}, rest, -1)), Const(factor))
        return Support(Interval(None, end), Interval(None, end))
    first = from_poly(plus(to_poly(floordiv(from_poly(rest), Const(-factor))), ONE))
    return Support(Interval(first, None), Interval(first, None))


def _both_ways(x: Poly, factor: int, rest: Poly, stream: Axis) -> Support:
    """c·|x| + r < 0: c·x + r < 0 and r - c·x < 0; one of the two where c is negative."""
    scaled = times({(): factor}, x)
    up, down = _below(plus(rest, scaled), stream), _below(plus(rest, scaled, -1), stream)
    return up.meet(down) if factor > 0 else up.union(down)


def _multiplied(x: Poly, d: Poly, factor: int, rest: Poly) -> Poly:
    """x // d + r < 0  →  x + d·r < 0;    r - x // d < 0  →  x // d >= r + 1  →  d·(r + 1) - x - 1 < 0"""
    if factor > 0:
        return plus(x, times(d, rest))
    return plus(plus(times(d, plus(rest, ONE)), x, -1), ONE, -1)


def _both(op: str, a: Node | None, b: Node | None) -> Node | None:
    """The nearer of two ends, of which one may be missing."""
    return extremum(op, a, b) if a is not None and b is not None else a if b is None else b


def _either(op: str, a: Node | None, b: Node | None) -> Node | None:
    """The farther of two ends; none where one is missing."""
    return extremum(op, a, b) if a is not None and b is not None else None
