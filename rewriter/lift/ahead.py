"""What later nodes do with the axes of a value: whether a chain may begin with it."""

from __future__ import annotations

import math
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import fx

from rewriter.ir import Apply, Axis, Const, Load, Node, Reduce, index, walk
from rewriter.lift.local import LocalLift, load_of
from rewriter.lift.repeated import sources
from rewriter.lift.values import Lifted
from rewriter.trace.sizes import UnknownSize

Sides = tuple[frozenset[Axis], frozenset[Axis]]  # rows and stream


class Origins(Enum):
    """What an origin combines: two values that move with the model's inputs; none, where memory holds it (STORED scores,
    normalised along an axis and weighed along it); or, in a contraction, a moving value and parameters: reduced
    ALONG_POSITIONS later (learned queries), or ANY (a dense layer: only what follows from it tells).
    """

    MOVING = auto()
    STORED = auto()
    ALONG_POSITIONS = auto()
    ANY = auto()


TENTATIVE = (Origins.ALONG_POSITIONS, Origins.ANY)  # what they begin may be a plain dense layer


@dataclass(frozen=True)
class Moving:
    """Nodes that depend on tensors the caller gives, and others that are as long as one: positions, and what follows
    from them and parameters.
    """

    given: set[fx.Node]
    long: set[fx.Node]

    @property
    def all(self) -> set[fx.Node]:
        return self.given | self.long


class Ahead:
    """What later nodes do with the axes of an origin."""

    def __init__(self, graph: fx.Graph, local: dict[fx.Node, LocalLift], movers: Moving):
        self.nodes, self.local, self.moving, self.given = list(graph.nodes), local, movers.all, movers.given
        self.by_name = {n.name: n for n in graph.nodes}
        self.axes = {n: axes for n in graph.nodes if (axes := _axes_of(n, local))}

    def weighed_along(self, order: int) -> Sides | None:
        """The rows and the stream of a value that memory holds, where it is reduced over the stream by itself, and what
        follows is weighed along it by something that has other rows: softmax(s) @ v. Both must be longer, in the
        example traced, than what they are weighed into, or nothing of size would be saved: softmax(k.mT) @ v.
        """
        axes = frozenset(filter(is_dynamic, self.axes[self.nodes[order]]))
        lengths = _lengths(self.nodes[order], self.axes[self.nodes[order]])
        reduced: frozenset[Axis] = frozenset()
        for node, reads, held, _ in self._readers(order, (), self.moving):
            lifted = self.local[node].value
            reduced |= _over_itself(lifted, reads, held) & axes
            stream = over_others(lifted, reads, held, self.moving) & reduced
            others = frozenset().union(*(load.free for n, load in reads if n not in held))
            left = _held_at(frozenset().union(*(load.free for n, load in reads if n in held)), reads, held)
            rows = (axes & left) - stream - _held_at(others, reads, held)
            into = _lengths(node, lifted.axes)
            width = math.prod(into[a] for a in lifted.axes if a in others and not _held_at(frozenset([a]), reads, held))
            if stream and rows and all(math.prod(lengths[a] for a in side) > width for side in (rows, stream)):
                return rows, stream
        return None

    def pooled_along(self, order: int) -> Sides | None:
        """The other axes of an origin, and those along which it is normalised and then weighs something, where that is
        a length: softmax_n(q[b, d] k[b, n, d]) · v[b, n, e] of one query.
        """
        axes = frozenset(a for a in self.axes[self.nodes[order]] if index(a).free)
        normalised: frozenset[Axis] = frozenset()
        for node, reads, held, _ in self._readers(order, (), self.moving):
            lifted = self.local[node].value
            if _has_no_more(lifted, inherited(lifted, reads, held)):
                normalised |= _over_itself(lifted, reads, held) & axes
            stream = over_others(lifted, reads, held, self.moving) & normalised
            if stream:
                return (axes - stream, stream) if axes - stream and any(map(is_dynamic, stream)) else None
        return None

    def narrowed(self, order: int, sides: Sides) -> Sides:
        """Both sides without what is only carried along, where one has several axes.

        q[b, m, r, d] k[b, n, g, d]  →  m and r, n alone: v[b, n, g, e] is weighed over n"""
        if max(map(len, sides)) == 1:
            return sides
        found: set[Axis] = set()
        for node, reads, held, _ in self._readers(order, sides, frozenset()):
            lifted = self.local[node].value
            found |= over_others(lifted, reads, held, self.moving) | _over_itself(lifted, reads, held)
        return tuple(side & found or side for side in sides)

    def is_worth(self, order: int, sides: Sides, kind: Origins) -> bool:
        """Whether one of its sides is reduced later: by itself, or weighed by something narrow after more than
        products, which is what a matrix product would do. ALONG_POSITIONS: by itself, and over what only a moving
        operand has. A table of positions must be reduced by itself, too.
        """
        origin = self.nodes[order]
        reads = sources(self.local[origin].value, self.by_name)
        fixed = frozenset().union(*(load.free for n, load in reads if n not in self.moving))
        axes = frozenset().union(*sides) - (fixed if kind is Origins.ALONG_POSITIONS else frozenset())
        weighs = kind is not Origins.ALONG_POSITIONS and origin in self.given
        operands = self.moving if kind is Origins.MOVING else set(self.nodes)
        for node, reads, held, is_product in self._readers(order, sides, operands):
            reader = self.local[node].value
            if axes & _over_itself(reader, reads, held):
                return True
            if weighs and not is_product and axes & over_others(reader, reads, held, operands):
                return True
        return False

    def is_normalised(self, order: int, sides: Sides) -> bool:
        """Whether one of its sides is reduced later by itself."""
        readers = self._readers(order, sides, self.moving)
        return any(frozenset().union(*sides) & _over_itself(self.local[n].value, r, held) for n, r, held, _ in readers)

    def _readers(self, order: int, sides: tuple[frozenset[Axis], ...], operands: Set[fx.Node]):
        """(node, reads, axes of the origin by dimension of what is read, whether all so far are factors) of each
        node that is computed from the origin while it has axes of both sides and none was summed together with one of
        the operands.
        """
        origin = self.nodes[order]
        held = {origin: tuple(frozenset([a]) for a in self.axes[origin])}
        products = {origin}
        for node in self.nodes[order + 1 :]:
            lifted = self.local[node].value if node in self.local else None
            reads = sources(lifted, self.by_name) if isinstance(lifted, Lifted) else []
            if not any(source in held for source, _ in reads):
                continue
            is_product = _is_weighed(lifted, reads, held, sides) and all(n in products for n, _ in reads if n in held)
            yield node, reads, held, is_product
            dims = inherited(lifted, reads, held)
            if not over_others(lifted, reads, held, operands) and all(
                side & frozenset().union(*dims) for side in sides
            ):
                held[node] = dims
                products |= {node} if is_product else set()


def _axes_of(node: fx.Node, local: dict[fx.Node, LocalLift]) -> tuple[Axis, ...]:
    """One for each dimension of a tensor."""
    lifted = local[node].value if node in local else None
    if isinstance(lifted, Lifted):
        return lifted.axes
    with suppress(UnknownSize):
        return load_of(node).axes if torch.is_tensor(node.meta.get("val")) else ()
    return ()


def _lengths(node: fx.Node, axes: tuple[Axis, ...]) -> dict[Axis, int]:
    """How long the dimensions of a tensor are in the example traced."""
    sizes = [s.node.hint if isinstance(s, torch.SymInt) else s for s in node.meta["val"].shape]
    return {a: int(n or 1) for a, n in zip(axes, sizes)}


def is_dynamic(axis: Axis) -> bool:
    return not isinstance(axis.extent, Const)


def over_others(lifted: Lifted, reads, held, operands: Set[fx.Node]) -> frozenset[Axis]:
    """Of the axes that are held, those summed together with an operand that is narrow."""
    narrow = [load.free for n, load in reads if n in operands and n not in held]
    return _held_at(frozenset().union(*narrow) - frozenset(lifted.axes), reads, held)


def _over_itself(lifted: Lifted, reads, held) -> frozenset[Axis]:
    """Of the axes that are held, those reduced where nothing else has them."""
    bound = frozenset(a for r in walk(lifted.body) if isinstance(r, Reduce) for a in r.axes)
    others = frozenset().union(*(load.free for n, load in reads if n not in held))
    return _held_at(bound - others, reads, held)


def _has_no_more(lifted: Lifted, dims: tuple[frozenset, ...]) -> bool:
    """Whether a value has no axes but those it has of an origin."""
    return all(held for axis, held in zip(lifted.axes, dims) if index(axis).free)


def _held_at(axes: frozenset[Axis], reads, held) -> frozenset[Axis]:
    """What is held of an origin where `axes` index it."""
    entries = [pair for n, load in reads for pair in zip(load.index, held.get(n, ()))]
    return frozenset().union(*(origin for entry, origin in entries if entry.free & axes))


def _is_weighed(lifted: Lifted, reads, held, sides: Sides) -> bool:
    """Whether a node is what is held of an origin times factors that lack a side of it, or a sum of that: what a matrix
    product of narrow values would do.
    """
    body = lifted.body.body if isinstance(lifted.body, Reduce) and lifted.body.op == "sum" else lifted.body
    factors = _factors(body)
    names = {n.name for n in held}
    if factors is None or sum(f.tensor.name in names for f in factors) != 1:
        return False
    others = [_held_at(f.free, reads, held) for f in factors if f.tensor.name not in names]
    return not any(all(side & axes for side in sides) for axes in others)


def _factors(body: Node) -> list[Load] | None:
    """The tensors of a product; None where it is something else. What divides comes twice: it is not linear in that."""
    if isinstance(body, Apply) and body.op in ("mul", "div", "cast"):
        parts = list(map(_factors, body.args if body.op != "div" else (*body.args, body.args[1])))
        return None if None in parts else [load for part in parts for load in part]
    if isinstance(body, Load):
        return [body]
    return None if body.free else []


def inherited(lifted: Lifted, reads, dims: dict[fx.Node, tuple[frozenset, ...]]) -> tuple[frozenset, ...]:
    """Each axis takes what is held by every dimension it indexes."""
    out: dict[Axis, set] = {a: set() for a in lifted.axes}
    for source, load in reads:
        for entry, held in zip(load.index, dims.get(source, ())):
            for axis in entry.free & out.keys() if not _is_lookup(entry, load) else ():
                out[axis] |= held
    return tuple(frozenset(out[a]) for a in lifted.axes)


def _is_lookup(entry: Node, load: Load) -> bool:
    """One position for each of those that the other dimensions give: log_p[b, s, label[b, s]]"""
    others = frozenset().union(*(e.free for e in load.index if e is not entry))
    return any(isinstance(n, Load) for n in walk(entry)) and entry.free <= others
