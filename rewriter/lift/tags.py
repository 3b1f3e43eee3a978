"""Which values are wide: rows × stream.

A node is an *origin* when it combines two narrow tensors of which each has an axis the other lacks (scores from q and
k, a document mask from two views of the ids). Its axes are tagged by side, and tags follow the axes through
everything computed from it. A value is *wide* while it has axes of both sides of one origin; a value computed from
wide ones that has lost a side of one is a *root*: it is stored, so that its tags end there.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from torch import fx

from rewriter.ir import Axis, Const, Load, Node, Reduce, open_reduce, walk
from rewriter.lift.ahead import TENTATIVE, Ahead, Moving, Origins, Sides, inherited, is_dynamic
from rewriter.lift.local import LocalLift
from rewriter.lift.repeated import Repeated, has_reduction, sources
from rewriter.lift.values import Lifted
from rewriter.trace.calls import value_inputs

SHORTEST = 4  # positions that are no long side
Tag = tuple[int, str]


@dataclass
class Tags:
    """`dims[node]` holds a set of tags per dimension; `roots`, `wide` and `written` in graph order.

    `origins` are the nodes that wide values begin with. `written` are wide values that a chain gives as they are,
    because something outside reads them; `stored` those that are read from memory by what follows. `derived[node]`
    are the origins that a value has been reduced over, or follows from one that has; `renewed[node]` those of them
    that a matrix product has come after: it may be as wide again. `paired` are origins whose values are paired along
    other axes later. `summaries` are origins that sum along positions, and are normalised; `pooled` origins that
    have one row, so that an operand has both sides.
    """

    dims: dict[fx.Node, tuple[frozenset[Tag], ...]] = field(default_factory=dict)
    origins: set[fx.Node] = field(default_factory=set)
    wide: list[fx.Node] = field(default_factory=list)
    roots: list[fx.Node] = field(default_factory=list)
    written: list[fx.Node] = field(default_factory=list)
    stored: set[fx.Node] = field(default_factory=set)
    derived: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    renewed: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    reasons: dict[fx.Node, str] = field(default_factory=dict)
    paired: set[fx.Node] = field(default_factory=set)
    summaries: dict[fx.Node, int] = field(default_factory=dict)
    pooled: set[fx.Node] = field(default_factory=set)

    def has_both_sides(self, node: fx.Node) -> bool:
        return bool(_origins(self.dims.get(node, ())))

    def is_derived(self, node: fx.Node) -> bool:
        """Whether a wide value follows from a reduction of its own rows × stream."""
        return bool(self.derived.get(node, frozenset()) & _origins(self.dims.get(node, ())))

    def behind(self, node: fx.Node) -> frozenset[int]:
        """The origins that what is computed from a node follows from."""
        return self.derived.get(node, frozenset()) | _origins(self.dims.get(node, ()))

    def is_wide(self, node: fx.Node) -> bool:
        return node not in self.stored and self.has_both_sides(node)


def _origins(dims: tuple[frozenset[Tag], ...]) -> set[int]:
    """Those of which a value has both sides."""
    tags = frozenset().union(*dims)
    return {origin for origin, _ in tags if {(origin, "rows"), (origin, "stream")} <= tags}


def _has_lost_a_side(dims: tuple[frozenset[Tag], ...], reads, tags: Tags) -> bool:
    """Whether a value has axes of one side only (or of none) of an origin of which it reads both."""
    read = set().union(*(_origins(tags.dims.get(source, ())) for source, _ in reads))
    return not read <= _origins(dims)


def tag(
    graph: fx.Graph,
    local: dict[fx.Node, LocalLift],
    movers: Moving,
    stopped: set[fx.Node],
    kind: Origins,
) -> Tags:
    """Tags every node.

    stopped: nodes taken as they are stored. Points that a matrix turns, R[n, i, j] p[n, h, j], are, too, where pairs of
    them follow: what is wide are the pairs, and each would turn its points again.
    """
    tagger = _Tagger(graph, local, movers, kind)
    tags = tagger.tagged(stopped)
    while tags.paired - stopped:
        stopped = stopped | tags.paired
        tags = tagger.tagged(stopped)
    return tags


class _Tagger:
    """Goes through a graph once. `layered` follows from a dense layer: its widths are numbers, what varies are lengths.
    `masked` are wide values that are no larger than what memory holds, wide by masks of two sides alone.
    """

    def __init__(self, graph: fx.Graph, local: dict[fx.Node, LocalLift], movers: Moving, kind: Origins):
        self.graph, self.local, self.kind, self.moving = graph, local, kind, movers.all
        self.by_name = {n.name: n for n in graph.nodes}
        self.ahead, self.repeated = Ahead(graph, local, movers), Repeated(graph, local)
        self.layered: set[fx.Node] = set()
        self.masked: set[fx.Node] = set()
        self.stopped: set[fx.Node] = set()
        self.tags = Tags()

    def tagged(self, stopped: set[fx.Node]) -> Tags:
        self.stopped, self.tags, self.layered, self.masked = stopped, Tags(), set(), set()
        for order, node in enumerate(self.graph.nodes):
            lifted = self.local[node].value if node in self.local else None
            if any(n in self.layered for n in node.all_input_nodes):
                self.layered.add(node)
            if isinstance(lifted, Lifted) and node not in stopped:
                self._tag(order, node, lifted)
            else:
                self._leave(order, node)
        return self.tags

    def _leave(self, order: int, node: fx.Node) -> None:
        """What memory holds."""
        tags = self.tags
        if self.kind in TENTATIVE:
            tags.derived[node] = tags.renewed[node] = frozenset().union(*map(tags.behind, node.all_input_nodes))
        if self.kind is Origins.STORED:
            _begin_stored(order, node, self.ahead, tags)

    def _tag(self, order: int, node: fx.Node, lifted: Lifted) -> None:
        tags, reads = self.tags, sources(lifted, self.by_name)
        if _is_half_fixed(lifted, reads, self.moving):
            self.layered.add(node)
        self._narrow(lifted, reads)
        dims = inherited(lifted, reads, tags.dims)
        before = frozenset().union(*(tags.derived.get(y, ()) for y, _ in reads))
        tags.renewed[node] = frozenset().union(*(tags.renewed.get(y, ()) for y, _ in reads))
        if contracts(lifted):
            tags.renewed[node] = frozenset().union(*(tags.behind(y) for y, _ in reads))
        ended = self._ended(node, lifted, reads, dims)
        if ended is not None:
            tags.derived[node] = before | ended
        elif self.kind is Origins.STORED and contracts(lifted):
            _begin_stored(order, node, self.ahead, tags)
        else:
            tags.dims[node] = self._begun(order, node, lifted, reads, dims)
            tags.derived[node] = before | _reduced_origins(lifted, reads, tags)
            if tags.has_both_sides(node):
                _place_wide(node, self.local, tags, self.stopped)
                self.masked |= {node} if self._is_masked(node, lifted, reads) else set()

    def _narrow(self, lifted: Lifted, reads) -> None:
        """A masked value that a dense layer reads is narrow, as it is without its mask: linear(x · (n < length[b]))"""
        if not contracts(lifted) or len({n for n, _ in reads if n in self.moving}) != 1:
            return
        for source, _ in reads:
            if source in self.masked:
                self.masked.discard(source)
                self.tags.dims[source] = tuple(frozenset() for _ in self.tags.dims[source])
                self.tags.wide = [n for n in self.tags.wide if n is not source]

    def _is_masked(self, node: fx.Node, lifted: Lifted, reads) -> bool:
        origins = (self.ahead.nodes[o] for o in _origins(self.tags.dims[node]))
        found = [self.local[o].value if o in self.local else None for o in origins]
        if not all(isinstance(v, Lifted) and not has_reduction(v.body) for v in found):
            return False
        axes = frozenset(a for a in lifted.axes if not isinstance(a.extent, Const) or a.extent.value > 1)
        return any(
            axes <= load.free and n in self.moving and (n in self.masked or not self.tags.has_both_sides(n))
            for n, load in reads
        )

    def _ended(self, node: fx.Node, lifted: Lifted, reads, dims: tuple[frozenset[Tag], ...]) -> frozenset[int] | None:
        """The origins that a value is computed from which wide ones do not go through; None for others."""
        tags = self.tags
        multiplied = _multiplied(lifted, reads, tags)
        if multiplied:
            for source in multiplied:
                _store(source, tags, "it is an operand of a product of two wide values, which stays eager")
            return frozenset().union(*(tags.behind(y) for y in multiplied))
        weights = _weights_of_summaries(lifted, reads, dims, tags)
        if weights:
            for source in weights:
                _store(source, tags, None)
            return frozenset().union(*(tags.behind(y) for y in weights))
        if _has_lost_a_side(dims, reads, tags) or (not _origins(dims) and _is_chain(lifted, reads, self.moving)):
            tags.roots += [node] if any(node in value_inputs(u) for u in node.users) else []
            return frozenset().union(*(_origins(tags.dims.get(y, ())) for y, _ in reads))
        joined = _joined_again(self.repeated.written_out(lifted), self.by_name, dims, tags)
        for source in joined:
            _store(source, tags, "it is joined by what follows from it")
        return frozenset() if joined else None

    def _begun(self, order: int, node: fx.Node, lifted: Lifted, reads, dims) -> tuple[frozenset[Tag], ...]:
        """The tags of a value's dimensions, its own among them where wide values begin with it."""
        tags, is_layered = self.tags, node in self.layered
        half_fixed = self.kind in TENTATIVE and _is_half_fixed(lifted, reads, self.moving)
        alive = {n for n, _ in reads} if half_fixed else self.moving
        narrow = {n for n in alive if not tags.has_both_sides(n)}
        sides = self._summary_sides(order, lifted, reads, narrow) if is_layered else None
        if sides:
            tags.summaries[node] = order
        sides = sides or _sides(lifted, reads, narrow, is_layered)
        if not sides and not _origins(dims):
            # An operand may repeat what it is made of: q[m, d] · (k[n, d] + table[m - n, d])
            opened = self.repeated.opened(self.repeated.written_out(lifted))
            sides = _sides(opened, sources(opened, self.by_name), narrow, is_layered)
        if sides and self.kind is not Origins.STORED and self.ahead.is_worth(order, sides, self.kind):
            tags.origins.add(node)
            dims = _with_origin(order, lifted.axes, dims, self.ahead.narrowed(order, sides))
        elif not _origins(dims) and (pooled := self._pooled(order, node, lifted, reads, alive)):
            tags.origins.add(node)
            tags.pooled.add(node)
            dims = _with_origin(order, lifted.axes, dims, pooled)
        if not sides:
            pair = _sides(lifted, reads, alive, is_layered)
            tags.paired |= {self.ahead.nodes[o] for o in _paired_beside(pair, lifted, dims)}
        return dims

    def _pooled(self, order: int, node: fx.Node, lifted: Lifted, reads, alive: set[fx.Node]) -> Sides | None:
        """The sides of scores of one row: of a query by itself, or one that is learned."""
        if self.kind in (Origins.STORED, Origins.ANY) or node not in self.ahead.axes or not contracts(lifted):
            return None
        if sum(node in alive for node, _ in reads) < 2 or any(map(self.tags.has_both_sides, (n for n, _ in reads))):
            return None
        return self.ahead.pooled_along(order)

    def _summary_sides(self, order: int, lifted: Lifted, reads, narrow: set[fx.Node]) -> Sides | None:
        """The sides of a summary that is normalised along one of them: softmax(q[n, c] k[n, d]) of channels."""
        if self.kind is not Origins.MOVING:
            return None
        reduces = [r for r in walk(lifted.body) if isinstance(r, Reduce)]
        pairs = ((r, _outer_pair(lifted.axes, _inside(r, reads), narrow)) for r in reduces)
        sides = next((sides for r, sides in pairs if sides and _is_summary(r, sides)), None)
        return sides if sides and self.ahead.is_normalised(order, sides) else None


def _weights_of_summaries(lifted: Lifted, reads, dims: tuple[frozenset[Tag], ...], tags: Tags) -> list[fx.Node]:
    """The weights, short, by which something is weighed that is as long as what was summed into them."""
    if not contracts(lifted) or not _has_lost_a_side(dims, reads, tags):
        return []
    summaries = frozenset(tags.summaries.values())
    return [source for source, _ in reads if _origins(tags.dims.get(source, ())) & summaries]


def _paired_beside(pair: Sides | None, lifted: Lifted, dims: tuple[frozenset[Tag], ...]) -> set[int]:
    """The origins whose both sides a value has beside a pair of other axes, or with either side of a pair, as
    q[i, m] · k[i, n] has of values over i and m.
    """
    if not pair:
        return set()
    rows, stream = (_origins(_beside(side, lifted, dims)) for side in reversed(pair))
    axes = frozenset().union(*pair)
    inside = {o for axis, held in zip(lifted.axes, dims) if axis in axes for o, _ in held}
    beside = _origins(_beside(axes, lifted, dims))
    return (beside - inside) | ((rows & stream) - beside)


def _beside(axes: frozenset[Axis], lifted: Lifted, dims: tuple[frozenset[Tag], ...]) -> tuple[frozenset[Tag], ...]:
    return tuple(held for axis, held in zip(lifted.axes, dims) if axis not in axes)


def _begin_stored(order: int, node: fx.Node, ahead: Ahead, tags: Tags) -> None:
    """Tags the sides of a value that memory holds, where a chain may begin with it."""
    axes = ahead.axes.get(node, ()) if node in ahead.given else ()
    sides = ahead.weighed_along(order) if sum(map(is_dynamic, axes)) > 1 else None
    if sides:
        tags.origins.add(node)
        tags.stored.add(node)
        tags.dims[node] = _with_origin(order, axes, [frozenset()] * len(axes), sides)


def _multiplied(lifted: Lifted, reads, tags: Tags) -> list[fx.Node]:
    """The operands of a matrix product of two wide values, sum_n a[i, n] · b[n, j]: where neither is written, every
    element of one is computed again for every row of the other.
    """
    sums = [r for r in walk(lifted.body) if isinstance(r, Reduce) and r.op == "sum"]
    found: dict[fx.Node, None] = {}
    for total in sums:
        inside = _inside(total, reads)
        for (first, a), (second, b) in itertools.combinations(inside, 2):
            shared = a.free & b.free & frozenset(total.axes)
            rows, columns = ((x - y) & frozenset(lifted.axes) for x, y in ((a.free, b.free), (b.free, a.free)))
            sides = (first, a, rows), (second, b, columns)
            if all(_spans(tags, node, load, shared, own) for node, load, own in sides):
                found |= dict.fromkeys((first, second))
    return list(found)


def _spans(tags: Tags, node: fx.Node, load: Load, shared: frozenset[Axis], own: frozenset[Axis]) -> bool:
    """Whether a value is wide by axes that it shares with another, and by some of its own."""
    across, along = (
        frozenset().union(*(held for entry, held in zip(load.index, tags.dims.get(node, ())) if entry.free & axes))
        for axes in (shared, own)
    )
    return bool(_origins((across, along)) - _origins((across,)) - _origins((along,)))


def _joined_again(
    lifted: Lifted, by_name: dict[str, fx.Node], dims: tuple[frozenset[Tag], ...], tags: Tags
) -> list[fx.Node]:
    """Wide values that meet something as large that was computed from what they were reduced to: x in x + f(norm(x)).
    A chain would compute x again for whatever follows, layer after layer.
    """
    reads, by_axis = sources(lifted, by_name), dict(zip(lifted.axes, dims))
    back: set[int] = set()
    for source, load in reads:
        sides = [tag for axis in load.free & by_axis.keys() for tag in by_axis[axis]]
        earlier = tags.renewed.get(source, frozenset()) - _origins(tags.dims.get(source, ()))
        back |= {o for o in earlier if {(o, "rows"), (o, "stream")} <= set(sides)}
    return [source for source, _ in reads if _origins(tags.dims.get(source, ())) & back]


def contracts(lifted: Lifted) -> bool:
    """Whether a value sums products of two tensors."""
    sums = [r for r in walk(lifted.body) if isinstance(r, Reduce) and r.op == "sum"]
    return any(len({n.tensor for n in walk(r.body) if isinstance(n, Load) and n.free & set(r.axes)}) > 1 for r in sums)


def _place_wide(node: fx.Node, local: dict[fx.Node, LocalLift], tags: Tags, stopped: set[fx.Node]) -> None:
    """A wide value is inside a chain, unless something outside reads it: then it is written, by the chain if it
    follows from a reduction, else by the program itself.
    """
    reader = _reader_outside(node, local, stopped)
    derived = tags.is_derived(node)
    if reader is None or derived:
        tags.wide.append(node)
    if reader is None:
        return
    if reader == "" and derived:
        tags.written.append(node)
    elif reader == "":
        is_read = any(u.op != "output" for u in node.users)
        _store(node, tags, "it is returned" if is_read else None)
    else:
        _store(node, tags, f"it is read by an op that stays eager ({reader})")


def _store(node: fx.Node, tags: Tags, why: str | None) -> None:
    """Leaves a wide value to memory. why: what the report says of that, if anything."""
    if tags.is_derived(node) and node not in tags.written:
        tags.written.append(node)
    tags.stored.add(node)
    if why:
        tags.reasons[node] = f"written, because {why}"


def _reduced_origins(lifted: Lifted, reads, tags: Tags) -> set[int]:
    """The origins of wide values that a value is made of reductions of: softmax."""
    inside = (n for r in walk(lifted.body) if isinstance(r, Reduce) for n in walk(r.body))
    reduced = {n.tensor.name for n in inside if isinstance(n, Load)}
    return set().union(*(_origins(tags.dims.get(y, ())) for y, load in reads if load.tensor.name in reduced))


def _is_half_fixed(lifted: Lifted, reads, moving: set[fx.Node]) -> bool:
    """A contraction of something that moves with something that does not."""
    contracts = any(isinstance(n, Reduce) for n in walk(lifted.body))
    return contracts and len({n in moving for n, _ in reads}) == 2


def _sides(lifted: Lifted, reads, moving: set[fx.Node], is_layered: bool) -> Sides | None:
    """A node's own pair of sides, where it is an origin; of what follows from a dense layer, not for a summary."""
    reduces = [r for r in walk(lifted.body) if isinstance(r, Reduce)]
    if not reduces:
        return _outer_pair(lifted.axes, reads, moving)
    pairs = ((r, _outer_pair(lifted.axes, _inside(r, reads), moving)) for r in reduces)
    return next((sides for r, sides in pairs if sides and not (is_layered and _is_summary(r, sides))), None)


def _is_summary(reduce: Reduce, sides: Sides) -> bool:
    """Whether what is summed is longer than its sums are: q[n, c] k[n, d] over all positions n"""
    return any(map(is_dynamic, reduce.axes)) and not any(map(is_dynamic, frozenset().union(*sides)))


def _with_origin(order: int, axes: tuple[Axis, ...], dims, sides: Sides) -> tuple[frozenset[Tag], ...]:
    rows, stream = sides

    def side(axis: Axis) -> set[Tag]:
        return {(order, "rows")} if axis in rows else {(order, "stream")} if axis in stream else set()

    return tuple(held | side(axis) for axis, held in zip(axes, dims))


def _inside(reduce: Reduce, reads):
    """The reads of one contraction: what is added to its result is no operand."""
    names = {n.tensor.name for n in walk(reduce.body) if isinstance(n, Load)}
    return [(node, load) for node, load in reads if load.tensor.name in names]


def _outer_pair(axes: tuple[Axis, ...], reads, moving: set[fx.Node]) -> Sides | None:
    """(axes only the first read has, axes only the second has) of two reads that vary with the input."""
    used = frozenset().union(*(load.free for _, load in reads)) & frozenset(axes)
    if any(used <= load.free for _, load in reads):
        return None
    live = [load for node, load in reads if node in moving]
    for first, second in itertools.combinations(live, 2):
        rows, stream = (first.free - second.free) & used, (second.free - first.free) & used
        if rows and stream and not _is_short(rows) and not _is_short(stream):
            return rows, stream
    return None


def _is_short(side: frozenset[Axis]) -> bool:
    """A few fixed positions, like the coordinates of a point: nothing is wide by them."""
    extents = [a.extent for a in side]
    return all(isinstance(e, Const) for e in extents) and math.prod(e.value for e in extents) <= SHORTEST


def _is_chain(lifted: Lifted, reads, moving: set[fx.Node]) -> bool:
    """True for an op that is rows, stream and reduction in one: `scaled_dot_product_attention`, a long einsum."""
    live = {load.tensor.name for node, load in reads if node in moving}
    for reduce in (n for n in walk(lifted.body) if isinstance(n, Reduce)):
        bound, _, body = open_reduce(reduce)
        pairs = _along(bound, _live_loads(body, live))
        if any((a - b) & frozenset(lifted.axes) for a, b in pairs):
            return has_reduction(body)
        inner = [r for r in walk(body) if isinstance(r, Reduce) and r.op == "sum"]
        if any(_along(bound, _live_loads(r, live)) for r in inner):
            return True  # scores of one row: q[b, d] k[b, n, d]
    return False


def _live_loads(body: Node, live: set[str]) -> list[Load]:
    return [n for n in walk(body) if isinstance(n, Load) and n.tensor.name in live]


def _along(bound: tuple[Axis, ...], loads: list[Load]) -> list[tuple[frozenset[Axis], frozenset[Axis]]]:
    """The axes of each two of which the second has some that are bound, and the first lacks them."""
    return [(a.free, b.free) for a in loads for b in loads if (b.free - a.free) & frozenset(bound)]


def _reader_outside(node: fx.Node, local: dict[fx.Node, LocalLift], stopped: set[fx.Node]) -> str | None:
    """Why a wide value must be written: "" where it is returned, or read by a chain that was cut before, else what of
    index notation is missing in its reader.
    """
    readers = [u for u in node.users if u in local and local[u].value is None]
    if readers:
        return local[readers[0]].reason
    return "" if any(u.op == "output" or u in stopped for u in node.users) else None
