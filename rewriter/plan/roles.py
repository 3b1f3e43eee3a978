"""The role of every axis in one kernel: which are tiles, which stream, which contractions become matrix products."""

from __future__ import annotations

from collections.abc import Iterable

from rewriter.derive import Chain, Definition
from rewriter.derive.factors import as_product, depends_on, multiply
from rewriter.ir import (
    TRUE,
    Axis,
    Const,
    Index,
    Load,
    Node,
    Reduce,
    apply,
    const,
    fresh_axis,
    index,
    open_reduce,
    reduce,
    substitute,
    walk,
)
from rewriter.plan.kernel import Dot, Loop, Skew
from rewriter.plan.parts import is_operand
from rewriter.plan.wide import MAX_FEATURE

SHORT_ROW = 256  # positions of which several rows make a tile


def outermost(*nodes: Node) -> list[Reduce]:
    """The reductions that are inside no other."""
    found: dict[Reduce, None] = {}
    seen: set[Node] = set()
    todo = list(reversed(nodes))
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, Reduce):
            found[node] = None
        else:
            todo.extend(reversed(node.children))
    return list(found)


def tile_rows(chain: Chain, rows: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """One row axis, whose tile is reused by every position of the streams; two where contractions pair rows only."""
    streams = tuple(dict.fromkeys(d.stream for d in chain.definitions))
    pairs = [p for node in _leaves(chain) for p in _pairs(node, frozenset(rows) | frozenset(streams))]
    paired = {a for p in pairs if set(p) & set(streams) for a in p} & set(rows)
    if not paired:
        among_rows = next((p for p in pairs if set(p) <= set(rows)), None)
        if among_rows or (not streams and len(rows) > 1):
            return tuple(sorted(among_rows or rows[-2:], key=rows.index))
    row = _row(chain, tuple(a for a in rows if a in paired) or rows, streams)
    return (row,) if row else ()


def lone_rows(chain: Chain, rows: tuple[Axis, ...]) -> tuple[Axis, ...] | None:
    """The rows of a tile where rows share nothing that is reduced; None where they do, or are short.

    A row that lies together in memory has a program for itself; else the rows that lie side by side make a tile."""
    streams = {d.stream for d in chain.definitions}
    if not streams or _leaves(chain) or not all(map(_is_long_row, streams)):
        return None
    read = [(n, d) for d in chain.definitions for n in walk(*d.roots) if isinstance(n, Load)]
    loads = [(n, d) for n, d in read if depends_on(n, d.stream)]
    if not loads or not all(set(d.axes) <= n.free for n, d in loads):
        return None
    last = {n.index[-1] for n, _ in loads}
    if last <= {Index(s) for s in streams}:
        return ()
    return next(((a,) for a in rows if last == {Index(a)}), None)


def _is_long_row(stream: Axis) -> bool:
    return not isinstance(stream.extent, Const) or stream.extent.value > SHORT_ROW


def _leaves(chain: Chain) -> list[Reduce]:
    """Reductions of loaded values."""
    return [n for n in walk(*chain.roots) if isinstance(n, Reduce) and n.depth == 1]


def _pairs(node: Reduce, tiles: frozenset[Axis]) -> list[tuple[Axis, Axis]]:
    """Pairs of tile axes of which each is in one operand only."""
    loads = [n.free & tiles for n in walk(node.body) if isinstance(n, Load)]
    return [(x, y) for a in loads for b in loads for x in a - b for y in b - a]


def _row(chain: Chain, rows: tuple[Axis, ...], streams: tuple[Axis, ...]) -> Axis | None:
    """The row axis that streamed operands lack; where each has all of them, the longest."""
    if not rows:
        return None
    operands = _streamed_operands(chain, streams)
    reused = [a for a in rows if not any(a in load.free for load in operands)]
    return max(reused or rows, key=lambda a: (not isinstance(a.extent, Const), _extent(a), rows.index(a)))


def _extent(axis: Axis) -> int:
    return int(axis.extent.value) if isinstance(axis.extent, Const) else 0


def _streamed_operands(chain: Chain, streams: tuple[Axis, ...]) -> list[Load]:
    """Loads along a stream that are contracted or weighed."""
    inner = [n for c in _leaves(chain) for n in walk(c.body)]
    values = [n for d in chain.definitions for f in d.rest if _is_value(f, d, chain) for n in walk(f)]
    loads = [n for n in (*inner, *values) if isinstance(n, Load)]
    return [n for n in loads if any(depends_on(n, s) for s in streams)]


def _is_value(factor: Node, definition: Definition, chain: Chain) -> bool:
    """The values of a weighted sum, rather than a weight read from memory."""
    paired = frozenset(x for c in _leaves(chain) for p in _pairs(c, frozenset(chain.axes)) for x in p)
    rows = paired - {d.stream for d in chain.definitions}
    streamed = frozenset().union(
        frozenset(),
        *(
            n.free
            for c in _leaves(chain)
            for n in walk(c.body)
            if isinstance(n, Load) and depends_on(n, definition.stream)
        ),
    )
    return is_operand(factor, definition.stream) and not factor.free & (rows - streamed)


def inner_reductions(
    chain: Chain, rows: tuple[Axis, ...], streams: tuple[Axis, ...]
) -> tuple[tuple[Dot, ...], tuple[Loop, ...]]:
    """How every reduction inside the definitions and outputs is computed. Contractions of one length share their
    axis.
    """
    tiles = rows if len(rows) > 1 else (*rows, *streams)
    skews = [_distances(rows[0], s) for s in streams] if len(rows) == 1 else []
    dots: dict[Reduce, Dot] = {}
    loops: list[Loop] = []
    axes: dict[Node, Axis] = {}
    todo = outermost(*chain.roots)
    while todo:
        node = todo.pop(0)
        axis = axes.setdefault(node.axes[0].extent, fresh_axis(node.axes[0].extent, "d"))
        dot = as_dot(node, tiles, axis, skews)
        if dot:
            dots[node] = dot
            continue
        loops.append(_loop(node))
        todo += [n for n in outermost(loops[-1].predicate, loops[-1].body) if n not in dots]
    return tuple(dots.values()), tuple(loops)


def _loop(node: Reduce) -> Loop:
    """Of several axes the first is the loop's, the others are reduced inside."""
    axes, predicate, body = open_reduce(node)
    if len(axes) > 1:
        body, predicate = reduce(node.op, axes[1:], body, predicate), TRUE
    return Loop(node, axes[0], predicate, body)


def as_dot(node: Reduce, tiles: tuple[Axis, ...], axis: Axis, skews: Iterable[Skew] = ()) -> Dot | None:
    """sum_d left[x, d] · right[y, d] where x and y are tile axes, or distances of such, or None."""
    if node.op != "sum" or len(node.axes) != 1 or node.predicate is not TRUE or node.depth != 1:
        return None
    _, _, body = open_reduce(node, (axis,))
    product = as_product(body)
    factors = [f for f in product.over if axis in f.free]
    if product.under or product.predicate is not TRUE:
        return None
    skew = None if _is_long(axis) else next((s for s in skews if {s.rows, s.stream} <= node.free), None)
    if skew:
        factors, tiles = [_by_distance(f, skew) for f in factors], (*tiles, skew.axis)
    sides = [frozenset(tiles) & f.free for f in factors]
    found = sorted(frozenset().union(*sides), key=tiles.index)
    if len(found) != 2 or any(len(s) > 1 for s in sides):
        return None
    left = [f for f, s in zip(factors, sides) if found[1] not in s]
    right = [f for f, s in zip(factors, sides) if found[1] in s]
    scale = tuple(f for f in product.over if axis not in f.free)
    skew = skew if skew and found[1] is skew.axis else None
    return Dot(node, axis, *found, multiply(left), multiply(right), scale, _is_long(axis), skew)


def _distances(rows: Axis, stream: Axis) -> Skew:
    return Skew(rows, stream, fresh_axis(apply("sub", apply("add", rows.extent, stream.extent), const(1)), "t"))


def _by_distance(factor: Node, skew: Skew) -> Node:
    """What depends on rows and the stream by their distance alone, as a function of it; else itself.

    weight[min(max(n - m, -6), 6) + 6, d]   →   weight[min(max(t - M + 1, -6), 6) + 6, d]
    """
    if not {skew.rows, skew.stream} <= factor.free:
        return factor
    before = apply("sub", skew.rows.extent, const(1))
    moved = apply("sub", apply("add", index(skew.axis), index(skew.rows)), before)
    out = substitute(factor, {skew.stream: moved})
    return factor if skew.rows in out.free else out


def can_be_whole(loop: Loop) -> bool:
    """Whether an inner reduction is one of a tile with all its positions."""
    extent = loop.axis.extent
    is_short = isinstance(extent, Const) and extent.value <= MAX_FEATURE
    return is_short and loop.node.depth == 1 and len(loop.node.axes) == 1 and loop.node.op in ("sum", "max", "min")


def _is_long(axis: Axis) -> bool:
    return isinstance(axis.extent, Const) and axis.extent.value > MAX_FEATURE
