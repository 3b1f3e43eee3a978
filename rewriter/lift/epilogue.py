"""What follows a chain position by position, in its epilogue: `g * (a @ v)`, `(a0 @ v) - lam * (a1 @ v)`.

A result meets tensors that are there before it, whoever has computed them, and is written once, as what it has become;
of several chains that meet, the last takes in what joins them. Nothing is computed twice for it: what follows is as
large as the result, and each of its elements comes from one of the result's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace

from torch import fx

from rewriter.ir import Apply, Axis, Load, Node, Output, apply, fresh_axis, index, substitute, walk
from rewriter.ir.integer import product, proves
from rewriter.lift.local import LocalLift
from rewriter.lift.repeated import has_reduction, sources
from rewriter.lift.tags import contracts
from rewriter.lift.values import Lifted, positions
from rewriter.trace.sizes import shape_of
from rewriter.trace.source import modules_of

JUMPING = {"floor", "ceil", "round", "sign", "mod", "fmod", "floordiv", "truncdiv"}


@dataclass(frozen=True)
class Place:
    """Which element of a result a value's is: the result's index, over the value's axes."""

    result: fx.Node
    axes: tuple[Axis, ...]
    index: tuple[Node, ...]

    @property
    def merged(self) -> dict[Axis, tuple[Node, Node]] | None:
        """The axes that run along two of the result's dimensions, with how far along each: c of o[b, c // E, m, c % E] at
        [b, m, c]. None where elements lie in another order than by dimensions and pairs of them.
        """
        entries = [e for e in self.index if e.free]
        parts = {a: [e for e in entries if a in e.free] for a in self.axes if index(a).free}
        pairs = {a: _pair(a, found) for a, found in parts.items() if found != [index(a)]}
        return pairs if None not in pairs.values() and sum(map(len, parts.values())) == len(entries) else None

    def laid(self, output: Output) -> Output:
        """A value as it is written: over the dimensions of the result, o[b, m, h, e] for o[b, m, h * E + e]."""
        pairs = {a: (fresh_axis(x, "h"), fresh_axis(y, "e")) for a, (x, y) in (self.merged or {}).items()}
        if not pairs:
            return output
        by = {a: apply("add", apply("mul", index(x), y.extent), index(y)) for a, (x, y) in pairs.items()}
        axes = tuple(b for a in output.axes for b in pairs.get(a, (a,)))
        shape = tuple(a.extent for a in output.axes)
        return replace(output, axes=axes, body=substitute(output.body, by), shape=shape)


def _pair(axis: Axis, entries: list[Node]) -> tuple[Node, Node] | None:
    """The extents of x and y where an axis is x * Y + y, and both index something."""
    for found in entries:
        if isinstance(found, Apply) and found.op == "mod" and found.args[0] is index(axis):
            outer, width = apply("floordiv", index(axis), found.args[1]), found.args[1]
            return (apply("floordiv", axis.extent, width), width) if set(entries) == {outer, found} else None
    return None


class Followers:
    """Finds what follows the results of a region, and what is computed for that alone."""

    def __init__(self, graph: fx.Graph, local: dict[fx.Node, LocalLift]):
        self.nodes, self.local = list(graph.nodes), local
        self.by_name = {n.name: n for n in graph.nodes}

    def places(self, results: Iterable[fx.Node], outside: Set[fx.Node], closed: Set[fx.Node]) -> dict[fx.Node, Place]:
        """Where the elements of all that follows come from, views too, in graph order.

        outside: what comes after a result of this region or a later one. closed: what is not taken, like a region's own
        values.
        """
        places = {r: self._own(r) for r in results}
        own = set(places)
        for node in self.nodes:
            place = self._place_of(node, places, outside) if node not in closed and node not in own else None
            if place:
                places[node] = place
        return {n: p for n, p in places.items() if n not in own}

    def is_arithmetic(self, node: fx.Node) -> bool:
        return not isinstance(self.local[node].value.body, Load)

    def is_no_larger(self, before: list[fx.Node], after: list[fx.Node], places: Mapping[fx.Node, Place]) -> bool:
        """Whether one thing is written for another: beside what the program writes anyway, no result becomes two or a wider
        one, which what reads them has to read again.
        """
        new = [n for n in after if n not in before]
        freed: dict[fx.Node, int] = {n: _width(n) for n in before if n not in after}
        for node in new:
            if places[node].merged is None:
                return False
            if not self._is_written_anyway(node):
                freed[places[node].result] = freed.get(places[node].result, 0) - _width(node)
        return all(left >= 0 for left in freed.values())

    def made_for(self, following: Set[fx.Node], closed: Set[fx.Node]) -> set[fx.Node]:
        """Arithmetic of which nothing but `following` reads the results: `1 - g`, sigmoid of a gate."""
        found: set[fx.Node] = set()
        for node in reversed(self.nodes):
            readers = set(node.users)
            if readers and readers <= following | found and node not in closed | following and self._is_made(node):
                found.add(node)
        for node in self.nodes:  # views of what memory holds stay what they are
            if node in found and not self.is_arithmetic(node) and not found.intersection(node.all_input_nodes):
                found.discard(node)
        return found

    def _is_made(self, node: fx.Node) -> bool:
        lifted = self.local[node].value if node in self.local else None
        readers = map(modules_of, node.users)
        return isinstance(lifted, Lifted) and _is_smooth(lifted) and all(m == modules_of(node) for m in readers)

    def _own(self, result: fx.Node) -> Place:
        axes = self.local[result].value.axes
        return Place(result, axes, positions(axes))

    def _place_of(self, node: fx.Node, places: Mapping[fx.Node, Place], outside: Set[fx.Node]) -> Place | None:
        """None where a value does not follow, or is not as large."""
        lifted = self.local[node].value if node in self.local else None
        inputs = node.all_input_nodes
        if not isinstance(lifted, Lifted) or not any(n in places for n in inputs) or not _is_smooth(lifted):
            return None
        if any(n in outside and n not in places for n in inputs):
            return None
        found = {self._read_at(places[n], n, load, lifted) for n, load in sources(lifted, self.by_name) if n in places}
        place = found.pop() if len(found) == 1 else None
        return place if place and _is_as_large(node, place) and _is_around(node, place.result) else None

    def _read_at(self, place: Place, source: fx.Node, load: Load, reader: Lifted) -> Place:
        at = dict(zip(place.axes, load.index))
        return Place(place.result, reader.axes, tuple(substitute(e, at) for e in place.index))

    def _is_written_anyway(self, node: fx.Node) -> bool:
        """Whether a value, or a view of it, is returned, multiplied as a matrix or read by an op that stays eager."""
        for user in node.users:
            lifted = self.local[user].value if user in self.local else None
            if not isinstance(lifted, Lifted) or contracts(lifted):
                return True
            if not self.is_arithmetic(user) and self._is_written_anyway(user):
                return True
        return False


def _is_smooth(lifted: Lifted) -> bool:
    """Whether a value moves little where what it is computed from does: eager has rounded that."""
    values = [n for n in walk(lifted.body) if not isinstance(n, Load)]
    inside = {m for n in walk(lifted.body) if isinstance(n, Load) for m in n.index for m in walk(m)}
    computed = [n for n in values if n not in inside]
    jumps = any(isinstance(n, Apply) and n.op in JUMPING for n in computed)
    return not has_reduction(lifted.body) and not jumps and all(n.dtype.is_floating_point for n in computed)


def _is_as_large(node: fx.Node, place: Place) -> bool:
    sizes = (product(shape_of(n.meta["val"])) for n in (node, place.result))
    return proves("eq", *sizes) and not any(isinstance(n, Load) for n in walk(*place.index))


def _is_around(node: fx.Node, result: fx.Node) -> bool:
    """Whether the module whose forward computes a value holds the result, too: calls of others stay calls."""
    around = modules_of(node)
    return modules_of(result)[: len(around)] == around


def _width(node: fx.Node) -> int:
    return node.meta["val"].dtype.itemsize
