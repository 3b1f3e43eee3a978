"""Values that repeat or generate their elements: cheaper computed again than loaded."""

from __future__ import annotations

from torch import fx

from rewriter.ir import Axis, Load, Node, Reduce, index, transform, walk
from rewriter.ir.integer import product, proves
from rewriter.lift.local import LocalLift, load_of
from rewriter.lift.values import Lifted
from rewriter.trace.calls import call_name

LONGEST = 256  # nodes of a value that are computed again rather than loaded: more is a mask filled row by row


class Repeated:
    """Which values of a graph are so, and what they are made of."""

    def __init__(self, graph: fx.Graph, local: dict[fx.Node, LocalLift]):
        self.local = local
        self.by_name = {n.name: n for n in graph.nodes}
        self.cheaper: dict[fx.Node, bool] = {}
        self.unstored: dict[fx.Node, Lifted] = {}

    def is_cheaper(self, source: fx.Node) -> bool:
        """True where a value repeats or generates its elements: masks from positions, heads repeated by a view."""
        if source not in self.cheaper:
            value = self._unstored(source)
            loads = [n for n in walk(value.body) if isinstance(n, Load)]
            if loads and call_name(source) in ("cat", "stack"):
                self.cheaper[source] = all(map(self.is_cheaper, source.all_input_nodes))
            else:
                everything = frozenset(a for a in value.axes if index(a).free)
                self.cheaper[source] = not any(covers(load, everything) for load in loads)
        return self.cheaper[source]

    def contracts(self, value: Lifted) -> bool:
        """Whether a value is a contraction with an operand that repeats, and is larger than the value: table[i - j]."""
        operands = {n.tensor.name for n in walk(value.body) if isinstance(n, Load)}
        sums = [n.op == "sum" for n in walk(value.body) if isinstance(n, Reduce)]
        return sums == [True] and any(self.is_cheaper(self.by_name[name]) for name in operands)

    def written_out(self, value: Lifted) -> Lifted:
        """With what each operand that is cheaper than stored is made of."""

        def rule(n: Node) -> Node:
            if isinstance(n, Load) and self.is_cheaper(self.by_name[n.tensor.name]):
                return self._unstored(self.by_name[n.tensor.name]).at(n.index)
            return n

        return Lifted(value.axes, transform(value.body, rule))

    def opened(self, value: Lifted) -> Lifted:
        """A view of such a contraction as what that computes: pairs of positions along one axis as two."""
        source = self.by_name[value.body.tensor.name] if isinstance(value.body, Load) else None
        local = self.local[source].value if source in self.local else None
        if not isinstance(local, Lifted) or not self.contracts(local):
            return value
        return self.written_out(Lifted(value.axes, local.at(value.body.index)))

    def _unstored(self, source: fx.Node) -> Lifted:
        """The value so written out, unless that is long or reduces something."""
        if source not in self.unstored:
            local = self.local[source].value if source in self.local else None
            is_plain = isinstance(local, Lifted) and not has_reduction(local.body)
            value = self.written_out(local) if is_plain else load_of(source)
            is_long = sum(1 for _ in walk(value.body)) > LONGEST
            self.unstored[source] = load_of(source) if is_long else value
        return self.unstored[source]


def sources(lifted: Lifted, by_name: dict[str, fx.Node]) -> list[tuple[fx.Node, Load]]:
    """The reads of a local lift, with the nodes that are read."""
    return [(by_name[n.tensor.name], n) for n in walk(lifted.body) if isinstance(n, Load)]


def covers(load: Load, axes: frozenset[Axis]) -> bool:
    """True where the tensor read has at least as many elements as `axes` have positions, and each of them moves the
    read.
    """
    return axes <= load.free and proves("le", product(a.extent for a in axes), product(load.tensor.shape))


def has_reduction(body: Node) -> bool:
    """Whether a value holds a reduction: its result is better stored than computed again."""
    return any(isinstance(n, Reduce) for n in walk(body))
