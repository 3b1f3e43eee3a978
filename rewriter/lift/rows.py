"""Finds lone rows, for `--rows`: reductions over an axis, whose results meet the axis again or are read by another.

Nothing here is wider than what is read. A region begins at one such reduction and takes in what costs nothing:
reductions of the same rows, and what is computed position by position from their results, or for them alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from rewriter.ir import Axis, Const, Load, Node, Param, Program, Reduce, index, walk
from rewriter.ir.integer import product, proves
from rewriter.lift.flatten import Flat, flat_of, undecided
from rewriter.lift.local import LocalLift, lift_locally
from rewriter.lift.region import Cutter, Region, moving_nodes
from rewriter.lift.tags import Tags, sources
from rewriter.lift.values import Lifted, positions
from rewriter.trace import TracedModule
from rewriter.trace.calls import reads_shape_only
from rewriter.trace.sizes import shape_of
from rewriter.trace.source import user_names

SHORTEST = 4  # fixed positions that are no long row


@dataclass(frozen=True)
class Line:
    """The dimensions of a value that run along its row, and those that tell rows apart; a part of one may do both."""

    along: frozenset[int]
    rows: frozenset[int]


@dataclass(frozen=True)
class Rows:
    """The regions of lone rows, and why a reduction that begins one has none; what could be one if sizes were known."""

    regions: tuple[Region, ...]
    refused: dict[fx.Node, str]
    undecided: dict[Param, fx.Node] = field(default_factory=dict)


def lift_rows(traced: TracedModule, taken: frozenset[fx.Node], first: int) -> Rows:
    """Regions around lone rows of what is not `taken` by other chains, numbered from `first`."""
    local = lift_locally(traced.graph)
    cutter = Cutter(traced, local, Tags(), user_names(traced.graph))
    graph = _Graph(list(traced.graph.nodes), local)
    free = frozenset(moving_nodes(traced.graph, traced).given) - taken
    regions: list[Region] = []
    refused: dict[fx.Node, str] = {}
    sizes: dict[Param, fx.Node] = {}
    for seed in graph.nodes:
        if seed not in free or not _is_seed(seed, local):
            continue
        growth = _Growth(graph, free, seed)
        if not growth.lines:
            continue
        name = f"chain_{first + len(regions)}"
        region = cutter.cut_members(name, growth.outputs, growth.members, growth.wide, growth.laid)
        if not _is_row(region.program, growth):
            continue
        if growth.refusal:
            refused |= dict.fromkeys(growth.members, growth.refusal)
            sizes |= dict.fromkeys(growth.undecided, growth.outputs[0])
        else:
            regions.append(region)
        free = free - growth.members
    return Rows(tuple(regions), refused, sizes)


def _is_seed(node: fx.Node, local: dict[fx.Node, LocalLift]) -> bool:
    lifted = local[node].value if node in local else None
    return isinstance(lifted, Lifted) and node.meta["val"].dtype.is_floating_point and _reduces_lone(lifted)


def _reduces(node: Node) -> list[Reduce]:
    return [n for n in walk(node) if isinstance(n, Reduce)]


def _reduces_lone(lifted: Lifted) -> bool:
    """Whether a value holds reductions, each of something that is read as wide as it is: no contraction is."""
    found = _reduces(lifted.body)
    return bool(found) and all(_operands(r) for r in found)


def _operands(reduce: Reduce) -> list[Load]:
    """What is read at every position that a reduction goes over."""
    whole = reduce.free | frozenset(a for a in reduce.axes if index(a).free)
    return [n for n in walk(reduce.body) if isinstance(n, Load) and whole <= n.free]


def _is_row(program: Program, growth: _Growth) -> bool:
    """Whether a result meets its row again or is read by another reduction."""
    bodies = [(o.body, n) for o, n in zip(program.outputs, growth.outputs)]
    return any(b.depth > 1 or (b.depth and growth.lines[n].along) for b, n in bodies)


class _Graph:
    """What is asked of a graph again and again."""

    def __init__(self, nodes: list[fx.Node], local: dict[fx.Node, LocalLift]):
        self.nodes = nodes
        self.lifted = {n: x.value for n, x in local.items() if isinstance(x.value, Lifted)}
        self.tuples = {n for n, x in local.items() if isinstance(x.value, tuple)}
        self.by_name = {n.name: n for n in nodes}
        self.reads = {n: sources(x, self.by_name) for n, x in self.lifted.items()}
        self.reduces = {n: _reduces(x.body) for n, x in self.lifted.items()}
        self.inputs = {n: [s for s, _ in self.reads.get(n, ())] or n.all_input_nodes for n in nodes}

    def readers(self, node: fx.Node) -> frozenset[fx.Node]:
        """What reads a value, beyond tuples; the graph's output, too."""
        found: set[fx.Node] = set()
        for user in node.users:
            is_value = isinstance(user.meta.get("val"), (torch.Tensor, tuple, list))
            if user.op == "output" or (is_value and not reads_shape_only(user)):
                found |= self.readers(user) if user in self.tuples else {user}
        return frozenset(found)

    def is_convex(self, members: frozenset[fx.Node]) -> bool:
        """Whether no member waits for something outside that waits for a member."""
        waits: set[fx.Node] = set()
        for node in self.nodes:
            if any(n in waits for n in self.inputs[node]):
                if node in members:
                    return False
                waits.add(node)
            elif node not in members and any(n in members for n in self.inputs[node]):
                waits.add(node)
        return True


class _Growth:
    """The members of one region, grown from a reduction.

    `lines` has those of members and of what they read at every position of a row.
    """

    def __init__(self, graph: _Graph, free: frozenset[fx.Node], seed: fx.Node):
        self.graph, self.free = graph, free
        self.members: frozenset[fx.Node] = frozenset()
        self.lines: dict[fx.Node, Line] = {}
        lifted = graph.lifted[seed]
        load = _operands(graph.reduces[seed][-1])[0]
        self.shape = load.tensor.shape
        self.size = product(self.shape)
        self.row = _line_of_operand(lifted, load)
        self.lengths = _lengths(lifted, load)
        self.lines[graph.by_name[load.tensor.name]] = self.row
        if self._added(seed):
            self._grow()
            self._trim()
        else:
            self.lines = {}

    @property
    def wide(self) -> tuple[fx.Node, ...]:
        """Members of a number per position, but those that are written."""
        return tuple(n for n in self._in_order() if self.lines[n].along and n not in self.outputs)

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        return tuple(n for n in self._in_order() if self.graph.readers(n) - self.members)

    @property
    def refusal(self) -> str:
        """Why no kernel is to be written for the rows; empty where one is."""
        length = product(self.lengths.values())
        if isinstance(length, Const) and length.value <= SHORTEST:
            return f"{length.value} positions are no long row"
        if proves("eq", length, self.size):
            return "all of the tensor is one row, which one program would read alone"
        if self._is_folded and self._flat is None:
            return "a row is of several axes that do not lie together"
        return ""

    @property
    def undecided(self) -> frozenset[Param]:
        """Sizes without which a row of several axes is not seen to be one."""
        is_apart = self._is_folded and self._flat is None
        return undecided(self.shape, self.lengths) if is_apart else frozenset()

    def laid(self, node: fx.Node, value: Lifted) -> Lifted:
        """A member over the axes of rows and position, where its own are several or others."""
        if not self._is_folded or self._flat is None:
            return value
        return self._flat.of(value, bool(self.lines[node].along)) if node in self.lines else value

    @cached_property
    def _flat(self) -> Flat | None:
        return flat_of(self.shape, self.lengths)

    @cached_property
    def _is_folded(self) -> bool:
        """Whether a row is several axes, of what is reduced or of what is written."""
        several = any(len(r.axes) > 1 for n in self.members for r in self.graph.reduces[n])
        lines = [self.lines[n] for n in self.outputs]
        return several or any(len(line.along) > 1 or line.along & line.rows for line in lines)

    def _in_order(self) -> Iterator[fx.Node]:
        return (n for n in self.graph.nodes if n in self.members)

    # -- growing --------------------------------------------------------------------------------------------------

    def _grow(self) -> None:
        """Takes in what follows and what precedes, until nothing is left that fits."""
        before = None
        while before != self.members:
            before = self.members
            for node in self.graph.nodes:
                if self._follows(node):
                    self._added(node)
            for node in reversed(self.graph.nodes):
                if self._precedes(node):
                    self._added(node)

    def _is_candidate(self, node: fx.Node) -> bool:
        if node in self.members or node not in self.free or node not in self.graph.lifted:
            return False
        return not self.graph.reduces[node] or _reduces_lone(self.graph.lifted[node])

    def _follows(self, node: fx.Node) -> bool:
        """Computed from a member; or another reduction of the rows that members read."""
        if not self._is_candidate(node):
            return False
        reads = {source for source, _ in self.graph.reads[node]}
        reduces = bool(self.graph.reduces[node])
        return bool(reads & self.members) or (reduces and bool(reads & self.lines.keys()))

    def _precedes(self, node: fx.Node) -> bool:
        """Read by members alone: not written any more once it is a member."""
        readers = self.graph.readers(node)
        return bool(readers) and readers <= self.members and self._is_candidate(node)

    def _added(self, node: fx.Node) -> bool:
        """Makes a node a member, if it has a place in the rows."""
        line = self._line_of(node) or self.lines.get(node)
        if line is None or not self._fits(node, line) or not self.graph.is_convex(self.members | {node}):
            return False
        self.members |= {node}
        self.lines[node] = line
        self._note_operands(node, line)
        return True

    def _fits(self, node: fx.Node, line: Line) -> bool:
        """Whether a value has one number for each position, or one a row."""
        lifted = self.graph.lifted[node]
        own = frozenset(k for k, a in enumerate(lifted.axes) if index(a).free)
        if not all(self._is_whole(load) for reduce in self.graph.reduces[node] for load in _operands(reduce)):
            return False
        if line.along:
            return own <= line.along | line.rows and proves("eq", product(lifted.shape), self.size)
        results = [n for n, _ in self.graph.reads[node] if n in self.lines and not self.lines[n].along]
        same = all(proves("eq", product(lifted.shape), product(shape_of(n.meta["val"]))) for n in results)
        return own <= line.rows and same

    def _line_of(self, node: fx.Node) -> Line | None:
        """The line of a value, from what it reads of known lines; None where they disagree."""
        lifted = self.graph.lifted[node]
        bound = frozenset(a for r in self.graph.reduces[node] for a in r.axes)
        own = frozenset(a for a in lifted.axes if index(a).free)
        plain: set[tuple[frozenset[Axis], frozenset[Axis]]] = set()
        rows: frozenset[Axis] = frozenset()
        known = [(self.lines[source], load) for source, load in self.graph.reads[node] if source in self.lines]
        for line, load in known:
            along, apart = _axes_at(load, line.along), _axes_at(load, line.rows)
            if any(not e.free for e, extent in zip(load.index, load.tensor.shape) if extent is not Const(1)):
                return None
            if load.free & bound:
                if not self._reduces_all(load, line, bound):
                    return None
            elif line.along and not _is_looked_up(load, line):
                plain.add((along, apart))
            rows |= apart - bound
        if len(plain) > 1 or not known:
            return None
        along, apart = next(iter(plain), (frozenset(), rows))
        if not plain and own - rows and not bound:  # a result that meets something else as long as its row
            along = own - rows
        if not rows <= apart:
            return None
        at = {a: k for k, a in enumerate(lifted.axes)}
        return Line(frozenset(at[a] for a in along if a in at), frozenset(at[a] for a in apart if a in at))

    def _reduces_all(self, load: Load, line: Line, bound: frozenset[Axis]) -> bool:
        """Whether a read inside a reduction goes over the whole row, and over nothing else."""
        along = [load.index[d] for d in line.along if load.tensor.shape[d] is not Const(1)]
        others = [load.index[d] for d in line.rows - line.along]
        return all(e.free & bound for e in along) and not any(e.free & bound for e in others)

    def _note_operands(self, node: fx.Node, line: Line) -> None:
        """The lines of what a new member reads at each of its positions."""
        lifted = self.graph.lifted[node]
        bound = frozenset(a for r in self.graph.reduces[node] for a in r.axes)
        along = frozenset(lifted.axes[d] for d in line.along)
        rows = frozenset(lifted.axes[d] for d in line.rows)
        for source, load in self.graph.reads[node]:
            is_result = line.rows and load.free and load.free <= rows
            if source in self.lines or not (is_result or self._is_whole(load)):
                continue
            inside = bool(load.free & bound)
            moved = frozenset(k for k, e in enumerate(load.index) if e.free & (bound if inside else along))
            apart = frozenset(k for k, e in enumerate(load.index) if e.free & rows)
            self.lines[source] = Line(moved, apart)

    def _is_whole(self, load: Load) -> bool:
        """Whether what is read has a number for each position."""
        return proves("eq", product(load.tensor.shape), self.size)

    def _trim(self) -> None:
        """Leaves views at either end to eager: nothing is computed there."""
        before = None
        while before != self.members:
            before = self.members
            for node in self.graph.nodes:
                if node in self.members and self._moves_only(node) and self._is_at_an_end(node):
                    self.members -= {node}

    def _moves_only(self, node: fx.Node) -> bool:
        """Whether a value is another's, at other places."""
        lifted = self.graph.lifted[node]
        is_view = any(r.alias_info for r in getattr(getattr(node.target, "_schema", None), "returns", ()))
        return is_view and any(load.index != positions(lifted.axes) for _, load in self.graph.reads[node])

    def _is_at_an_end(self, node: fx.Node) -> bool:
        """Whether it begins or ends the region, and what it is a view of is read by nothing else there."""
        reads = {source for source, _ in self.graph.reads[node]}
        is_first = not (reads & self.members) and all(self.graph.readers(s) & self.members <= {node} for s in reads)
        return is_first or not (self.graph.readers(node) & self.members)


def _is_looked_up(load: Load, line: Line) -> bool:
    """Whether a row is read where something of the row says: the label's logit."""
    return any(isinstance(n, Load) for d in line.along for n in walk(load.index[d]))


def _axes_at(load: Load, dims: frozenset[int]) -> frozenset[Axis]:
    return frozenset().union(*(load.index[d].free for d in dims))


def _lengths(lifted: Lifted, load: Load) -> dict[int, Node]:
    """How far a row runs along each dimension of what is reduced."""
    own = frozenset(lifted.axes)
    bound = {k: [a.extent for a in e.free - own] for k, e in enumerate(load.index) if e.free - own}
    return {k: product(extents) for k, extents in bound.items()}


def _line_of_operand(lifted: Lifted, load: Load) -> Line:
    """Of what a reduction goes over: bound axes run along it, the others tell rows apart."""
    own = frozenset(lifted.axes)
    along = frozenset(k for k, e in enumerate(load.index) if e.free - own)
    return Line(along, frozenset(k for k, e in enumerate(load.index) if e.free & own))
