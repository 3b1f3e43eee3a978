"""Features too wide for a tile, in parts: a program has one of them, and computes the weights itself.

acc[m, e] = sum_n w[m, n] · v[n, e], e < 512   →   acc[m, g, i] = sum_n w[m, n] · v[n, 256·g + i]
"""

from __future__ import annotations

from rewriter.derive import Chain
from rewriter.ir import Axis, Const, Node, Ref, apply, const, fresh_axis, index, walk
from rewriter.plan.fold import Move
from rewriter.plan.parts import features_of

MAX_FEATURE = 256
LEAST_FEATURE = 64  # of a part: weights cost as much as values of so many features


def in_parts(chain: Chain) -> tuple[Chain, dict[Node, Node]]:
    """The chain with its wide features in parts, and its nodes as they were. Those stay whole that have no parts alike,
    and those of which something reads others than its own.
    """
    was: dict[Node, Node] = {}
    for axis in sorted(features_of(chain), key=chain.axes.index):
        parts = _parts(axis)
        if parts and _is_read_in_place(chain, axis):
            move = _move(axis, parts)
            was = {move.node(n): was.get(n, n) for n in walk(*chain.roots)}
            chain = move.chain(chain)
    return chain, was


def _parts(axis: Axis) -> int:
    """How many there are, the fewest that fit; 0 where an axis fits as it is, or its parts would be narrow."""
    if not isinstance(axis.extent, Const) or axis.extent.value <= MAX_FEATURE:
        return 0
    wide = int(axis.extent.value)
    return next((p for p in range(2, wide // LEAST_FEATURE + 1) if wide % p == 0 and wide // p <= MAX_FEATURE), 0)


def _is_read_in_place(chain: Chain, axis: Axis) -> bool:
    """Whether what has features is only read at the same ones."""
    refs = [n for n in walk(*chain.roots) if isinstance(n, Ref)]
    read = [(chain.definition(n.name).axes, n.index) for n in refs]
    return all(at is index(axis) for axes, entries in read for a, at in zip(axes, entries) if a is axis)


def _move(axis: Axis, parts: int) -> Move:
    width = int(axis.extent.value) // parts
    which, inside = fresh_axis(const(parts), "g"), fresh_axis(const(width), "e")
    position = apply("add", apply("mul", index(which), const(width)), index(inside))
    return Move({axis: (which, inside)}, {axis: position}, {})
