"""What follows a chain position by position, in its epilogue: `g * (a @ v)`, `(a0 @ v) - lam * (a1 @ v)`.

A result meets tensors that are there before it, whoever has computed them, and is written once, as what it has become;
of several chains that meet, the last takes in what joins them. Nothing is computed twice for it: what follows is as
large as the result, and each of its elements comes from one of the result's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import permutations

import torch
from torch import fx

from rewriter.ir import Apply, Axis, Const, Load, Node, Output, apply, index, substitute, walk
from rewriter.ir.integer import product, proves
from rewriter.lift.local import LocalLift
from rewriter.lift.repeated import has_reduction, sources
from rewriter.lift.tags import contracts
from rewriter.lift.values import Lifted, positions
from rewriter.trace.calls import call_name
from rewriter.trace.sizes import shape_of
from rewriter.trace.source import modules_of

JUMPING = {"floor", "ceil", "round", "sign", "mod", "fmod", "floordiv", "truncdiv"}
MOST_MERGED = 4  # dimensions that lie together as one


@dataclass(frozen=True)
class Place:
    """Which element of a result each of a value's is: that of an index over the value's axes. `along` are the result's."""

    result: fx.Node
    along: tuple[Axis, ...]
    axes: tuple[Axis, ...]
    index: tuple[Node, ...]

    @cached_property
    def dims(self) -> tuple[tuple[Axis, ...], ...] | None:
        """The axes of the result along which each dimension of the value runs, the last the fastest: (b), (m) and (h, e)
        of o[b, c // E, m, c % E] at [b, m, c]. None where elements lie in another order.
        """
        entries = {a: e for a, e in zip(self.along, self.index) if e.free}
        dims = tuple(_order(a, {x: e for x, e in entries.items() if e.free == {a}}) for a in self.axes)
        return dims if None not in dims and sum(map(len, dims)) == len(entries) else None

    @property
    def back(self) -> dict[Axis, Node]:
        """The value's axes by those of the result: h * E + e for c"""
        return {a: _joined(dims) for a, dims in zip(self.axes, self.dims)}

    def written(self, output: Output) -> Output:
        """A value over the axes of the result, in the order and shape that it is to have."""
        shape = tuple(a.extent for a in self.axes)
        axes = tuple(x for a, dims in zip(self.axes, self.dims) for x in dims or (a,))
        return replace(output, axes=axes, shape=shape if len(axes) > len(shape) else ())


def _order(axis: Axis, entries: dict[Axis, Node]) -> tuple[Axis, ...] | None:
    """The order in which an axis runs along those that it indexes by these entries."""
    if len(entries) > MOST_MERGED or (index(axis).free and not entries):
        return None
    for order in permutations(entries):
        if all(substitute(entries[a], {axis: _joined(order)}) is index(a) for a in order):
            return order
    return None


def _joined(axes: tuple[Axis, ...]) -> Node:
    """(x * Y + y) * Z + z"""
    return reduce(lambda at, a: apply("add", apply("mul", at, a.extent), index(a)), axes, Const(0))


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
            if not self._is_written_anyway(node):
                freed[places[node].result] = freed.get(places[node].result, 0) - _width(node)
        return all(left >= 0 for left in freed.values())

    def made_for(self, following: Set[fx.Node], closed: Set[fx.Node]) -> set[fx.Node]:
        """Arithmetic of which nothing but `following` reads the results: `1 - g`, sigmoid of a gate."""
        found: set[fx.Node] = set()
        finest: dict[fx.Node, float] = {}  # of the types of what is computed from a value
        for node in reversed(self.nodes):
            readers = set(node.users)
            finest[node] = min([_step(node), *(finest[r] for r in readers if r in following | found)])
            is_for_them = readers and readers <= following | found and node not in closed | following
            if is_for_them and self._is_made(node) and not (_is_rounded(node) and finest[node] < _step(node)):
                found.add(node)
        for node in self.nodes:  # views of what memory holds stay what they are
            if node in found and self._is_view(node) and not found.intersection(node.all_input_nodes):
                found.discard(node)
        return found

    def _is_view(self, node: fx.Node) -> bool:
        return not self.is_arithmetic(node) and call_name(node) not in ("clone", "contiguous")

    def _is_made(self, node: fx.Node) -> bool:
        lifted = self.local[node].value if node in self.local else None
        readers = map(modules_of, node.users)
        return isinstance(lifted, Lifted) and _is_smooth(lifted) and all(m == modules_of(node) for m in readers)

    def _own(self, result: fx.Node) -> Place:
        axes = self.local[result].value.axes
        return Place(result, axes, axes, positions(axes))

    def _place_of(self, node: fx.Node, places: Mapping[fx.Node, Place], outside: Set[fx.Node]) -> Place | None:
        """None where a value does not follow, or is not as large."""
        lifted = self.local[node].value if node in self.local else None
        inputs = node.all_input_nodes
        if not isinstance(lifted, Lifted) or not any(n in places for n in inputs) or not _is_smooth(lifted):
            return None
        if any(n in outside and n not in places for n in inputs):
            return None
        if any(_step(node) < _step(n) and _step(n) > _step(places[n].result) for n in inputs if n in places):
            return None  # it sees what the program has rounded
        found = {self._read_at(places[n], n, load, lifted) for n, load in sources(lifted, self.by_name) if n in places}
        place = found.pop() if len(found) == 1 else None
        if place is None or place.dims is None or not _is_as_large(node, place.result):
            return None
        return place if _is_around(node, place.result) else None

    def _read_at(self, place: Place, source: fx.Node, load: Load, reader: Lifted) -> Place:
        at = dict(zip(place.axes, load.index))
        return Place(place.result, place.along, reader.axes, tuple(substitute(e, at) for e in place.index))

    def _is_written_anyway(self, node: fx.Node) -> bool:
        """Whether a value, or a view of it, is returned, multiplied as a matrix or read by an op that stays eager."""
        for user in node.users:
            if user not in self.local and user.op != "output":
                continue  # reads a size
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


def _is_as_large(node: fx.Node, result: fx.Node) -> bool:
    return proves("eq", *(product(shape_of(n.meta["val"])) for n in (node, result)))


def _is_around(node: fx.Node, result: fx.Node) -> bool:
    """Whether the module whose forward computes a value holds the result, too: calls of others stay calls."""
    around = modules_of(node)
    return modules_of(result)[: len(around)] == around


def _step(node: fx.Node) -> float:
    """How coarse a value's type is; of none that is rounded 0."""
    dtype = getattr(node.meta.get("val"), "dtype", None)
    return torch.finfo(dtype).eps if dtype is not None and dtype.is_floating_point else 0.0


def _is_rounded(node: fx.Node) -> bool:
    """Whether a program rounds what it has to a coarser type: `x.half()`."""
    return any(0 < _step(n) < _step(node) for n in node.all_input_nodes)


def _width(node: fx.Node) -> int:
    return node.meta["val"].dtype.itemsize
