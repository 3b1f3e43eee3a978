"""Turns the reductions of a program into definitions, in the order they depend on each other, each in the first sweep
it can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from rewriter.derive.axes import Axes, places_of
from rewriter.derive.chain import Centre, Definition, Shift
from rewriter.derive.factors import is_running
from rewriter.derive.forms import Form, NotDerivable
from rewriter.ir import (
    TRUE,
    Apply,
    Axis,
    Const,
    Load,
    Node,
    Reduce,
    Ref,
    fresh_axis,
    index,
    open_reduce,
    rebuild,
    reduce,
    substitute,
    transform,
    walk,
)


@dataclass
class Builder:
    """Collects definitions while reductions are replaced by `Ref`s, innermost dependence first.

    empty_is_zero: rows that see nothing but -inf give zeros, not eager's NaN.
    waits: no reduction shares a sweep with one that it reads, so that every body is computed as it is written.
    taken: names that definitions must not have: those of tensors and outputs.
    lengths: extents along which a contraction gives a summary, shorter than what it sums: it is computed once.
    """

    axes: Axes
    empty_is_zero: bool
    waits: bool = False
    taken: frozenset[str] = frozenset()
    lengths: frozenset[Node] = frozenset()
    definitions: list[Definition] = field(default_factory=list)
    known: dict[Node, Node] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    streams: set[Axis] = field(default_factory=set)

    def outputs(self, bodies: list[Node]) -> list[Node]:
        """The outputs with every reduction replaced by its final value, but for contractions that a sweep computes
        anyway.
        """
        chains = [self._resolved(b, lambda n: not is_leaf(n)) for b in bodies]
        inner = frozenset(walk(*(n for d in self.definitions for n in d.roots)))
        return [_final(self._resolved(b, lambda n: n not in inner)) for b in chains]

    def resolved(self, node: Node) -> Node:
        """`node` with every reduction outside others replaced by its value as a `Ref`."""
        return self._resolved(node, lambda n: True)

    def _resolved(self, node: Node, is_defined: Callable[[Reduce], bool]) -> Node:
        if isinstance(node, Reduce):
            is_summary = self._is_summary(node)
            if not is_defined(node) and not is_summary:
                return node
            if node not in self.known:
                self.known[node] = self._summary(node) if is_summary else self._defined(node)
            return self.known[node]
        if not node.children:
            return node
        return rebuild(node, tuple(self._resolved(c, is_defined) for c in node.children))

    def settled(self, node: Node, sweep: int) -> Node:
        """Refs to sweeps before `sweep` as final values."""
        by_name = {d.name: d for d in self.definitions}

        def rule(n: Node) -> Node:
            if isinstance(n, Ref) and not n.final and by_name[n.name].sweep < sweep:
                return replace(n, final=True)
            return n

        return transform(node, rule)

    def _defined(self, node: Reduce) -> Node:
        """The first sweep in which the reduction has a form: that of what it reads, else the one after."""
        stream, predicate, body = self._opened(node)
        predicate, body = (self._without_inner(n, stream) for n in (predicate, body))
        predicate, body = self._without_positions(predicate, body, stream)
        first = self._first_sweep(stream, predicate, body)
        reads = any(is_running(self.settled(n, first)) for n in (predicate, body))
        if reads and self.waits:
            return self._in_sweep(node.op, stream, predicate, body, first + 1)
        try:
            return self._in_sweep(node.op, stream, predicate, body, first)
        except NotDerivable as reason:
            if not reads:
                raise
            self.notes.append(f"another sweep: {reason}")
            return self._in_sweep(node.op, stream, predicate, body, first + 1)

    def _in_sweep(self, op: str, stream: Axis, predicate: Node, body: Node, sweep: int) -> Node:
        kept = list(self.definitions), list(self.notes)
        try:
            form = Form(self, stream, sweep)
            return form.of(op, self.settled(predicate, sweep), self.settled(body, sweep))
        except NotDerivable:
            self.definitions, self.notes = kept
            raise

    def _opened(self, node: Reduce) -> tuple[Axis, Node, Node]:
        """(stream, predicate, body): of several axes the first is the stream, the others are reduced inside.

        sum_{a,b} x  →  sum_a (sum_b x)
        """
        axes, predicate, body = open_reduce(node)
        if len(axes) > 1:
            body, predicate = reduce(node.op, axes[1:], body, predicate), TRUE
        taken = (body.free | predicate.free) - {axes[0]}
        stream = self.axes.named(axes[0], (predicate, body), taken, "n", frozenset(self.streams))
        self.streams.add(stream)
        if stream is axes[0]:
            return stream, predicate, body
        by = {axes[0]: index(stream)}
        return stream, substitute(predicate, by), substitute(body, by)

    def _without_inner(self, node: Node, stream: Axis, inner: frozenset[Axis] = frozenset()) -> Node:
        """Reductions inside become definitions of their own; what is computed anew for every tile stays.

        inner: axes of reductions around `node` that stay.
        """
        memo: dict[Node, Node] = {}

        def go(n: Node) -> Node:
            if n not in memo:
                if isinstance(n, Reduce):
                    memo[n] = self._of_inner(n, stream, inner)
                else:
                    memo[n] = rebuild(n, tuple(map(go, n.children))) if n.children else n
            return memo[n]

        return go(node)

    def _is_summary(self, node: Reduce) -> bool:
        """sum_n q[n, c] · k[n, d] of numbers c and d"""
        is_long = is_leaf(node) and len(node.axes) == 1 and node.axes[0].extent in self.lengths
        return is_long and all(isinstance(a.extent, Const) for a in _paired(_parts(node)))

    def _summary(self, node: Reduce) -> Node:
        """A summary over axes of its own, for what reads it has them in other roles: s[c, d] is a tile of both, and its
        softmax streams d.
        """
        own = {a: fresh_axis(a.extent, a.name.split("%")[0]) for a in self.axes.sorted(_paired(_parts(node)))}
        for axis, mine in own.items():
            self.axes.places[mine] = places_of(axis, (node,))
        renamed = substitute(node, {a: index(mine) for a, mine in own.items()})
        return substitute(self._defined(renamed), {mine: index(a) for a, mine in own.items()})

    def _without_positions(self, predicate: Node, body: Node, stream: Axis) -> tuple[Node, Node]:
        """Contractions for each position, beside earlier reductions that are read there, are made with those, by as many
        programs.

        sum_m (max_n s[m, n] - sum_d x[m, d] · w[label[m], d])
        """
        everything = predicate.free | body.free
        if not any(isinstance(n, Ref) and everything <= n.free for n in walk(predicate, body)):
            return predicate, body

        def is_own(n: Reduce) -> bool:
            return is_leaf(n) and everything <= n.free and not is_wide(n, stream)

        return self._resolved(predicate, is_own), self._resolved(body, is_own)

    def _of_inner(self, node: Reduce, stream: Axis, inner: frozenset[Axis]) -> Node:
        if self._is_summary(node):
            return self.resolved(node)
        if is_leaf(node) and node.free & (inner | {stream}):
            return node
        if not is_leaf(node) and is_wide(node, stream):
            return self._kept(node, stream, inner)
        return self.resolved(node)

    def _kept(self, node: Reduce, stream: Axis, inner: frozenset[Axis]) -> Node:
        """A wide reduction inside: over a short axis it is computed anew for every tile."""
        axes, predicate, body = open_reduce(node)
        named = []
        for axis in axes:
            taken = (body.free | predicate.free) - {axis}
            named.append(self.axes.named(axis, (predicate, body), taken, "g"))
            by = {axis: index(named[-1])}
            predicate, body = substitute(predicate, by), substitute(body, by)
        inner = inner | frozenset(named)
        predicate, body = (self._without_inner(n, stream, inner) for n in (predicate, body))
        if any(_meets(axis, stream, (predicate, body)) for axis in named):
            raise NotDerivable(f"a {node.op} of the product of two wide values")
        return reduce(node.op, tuple(named), body, predicate)

    def _first_sweep(self, stream: Axis, *nodes: Node) -> int:
        """The sweep of what is read where that runs along the same stream at the same rows, the one after otherwise."""
        by_name = {d.name: d for d in self.definitions}
        first = 0
        for ref in {n for n in walk(*nodes) if isinstance(n, Ref)}:
            read = by_name[ref.name]
            beside = read.stream is stream and stream not in ref.free and ref is read.ref
            first = max(first, read.sweep + (0 if beside else 1))
        return first

    def add(
        self,
        op: str,
        stream: Axis,
        sweep: int,
        predicate: Node,
        rest: tuple[Node, ...],
        shift: Shift | None,
        body: Node,
        extremum: Ref | None,
        centre: Centre | None = None,
    ) -> Node:
        """The `Ref` of a new definition, or of an equal one."""
        for known in self.definitions:
            if (known.op, known.stream, known.predicate, known.body) == (op, stream, predicate, body):
                return known.ref
        axes = self.axes.sorted((body.free | predicate.free) - {stream})
        if (body.free | predicate.free) - frozenset(axes) - {stream}:
            raise NotDerivable("a reduction over axes that no output has")
        name = f"{op}_{len(self.definitions)}"
        while name in self.taken:
            name = f"row_{name}"
        made = Definition(name, op, axes, stream, sweep, predicate, rest, shift, body, extremum, centre)
        self.definitions.append(made)
        return self.definitions[-1].ref


def _final(node: Node) -> Node:
    """Outputs are computed when every sweep has ended."""
    return transform(node, lambda n: replace(n, final=True) if isinstance(n, Ref) else n)


def is_leaf(node: Reduce) -> bool:
    """A contraction of what is loaded: no reduction inside, no earlier one read."""
    return not any(isinstance(n, (Reduce, Ref)) for n in walk(node.predicate, node.body))


def is_wide(node: Node, stream: Axis) -> bool:
    """Whether a value varies along the stream and along rows: two axes that scores inside pair, with each other or
    with a third, and that are not always together: a batch of keys against parameters has no rows.
    """
    parts = [part for n in walk(node) for part in _parts(n)]
    paired = frozenset().union(*(_paired(_parts(n)) for n in walk(node)))
    apart = {a for part in parts for a in paired if (a in part) != (stream in part)}
    return stream in paired and bool(apart & node.free)


def _meets(axis: Axis, stream: Axis, nodes: tuple[Node, ...]) -> bool:
    """Whether scores over rows and an axis meet others over that axis and the stream: p[m, axis] · p[axis, stream]"""
    scores = [s.free for s in walk(*nodes) if axis in _paired(_parts(s))]
    return any(a - b and stream in b - a for a in scores for b in scores)


def _parts(node: Node) -> list[frozenset[Axis]]:
    """The axes of what a score is made of: of the operands of a contraction, or of the two sides of a comparison."""
    if isinstance(node, Reduce):
        inside = _beside_indices(node.predicate, node.body)
        is_contraction = not any(isinstance(n, Reduce) for n in inside)
        return [n.free for n in inside if isinstance(n, Load)] if is_contraction else []
    if isinstance(node, Apply) and node.op in ("lt", "le", "eq", "ne"):
        return [a.free for a in node.args]
    return []


def _beside_indices(*nodes: Node) -> list[Node]:
    """Every node below some, but what tells where a tensor is read: an argmax, in k[argmax]."""
    found: dict[Node, None] = {}
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found[node] = None
            left += () if isinstance(node, Load) else node.children
    return list(found)


def _paired(parts: list[frozenset[Axis]]) -> frozenset[Axis]:
    """Axes that one part has and another lacks, which has one that the first lacks."""
    return frozenset().union(*(a - b for a in parts for b in parts if b - a))
