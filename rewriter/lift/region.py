"""Cuts wide regions out of the graph and writes each as a `Program`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from rewriter.errors import Reason, Site
from rewriter.ir import Load, Node, Origin, Output, Program, Reduce, index, substitute, transform, walk
from rewriter.lift.ahead import TENTATIVE, Moving, Origins, inherited, is_dynamic, over_others
from rewriter.lift.broadcast import broadcast_dimensions
from rewriter.lift.epilogue import Followers, Place
from rewriter.lift.local import LocalLift, lift_locally
from rewriter.lift.order import is_in_order
from rewriter.lift.passed import passed_on
from rewriter.lift.repeated import Repeated, covers, has_reduction, sources
from rewriter.lift.rounding import with_absorption, with_absorption_inside
from rewriter.lift.scattered import scattered
from rewriter.lift.tags import Tags, contracts, tag
from rewriter.lift.values import Lifted
from rewriter.lift.widened import Widened
from rewriter.trace import Dimension, TracedModule
from rewriter.trace.calls import VIEWS, call_name, value_inputs
from rewriter.trace.sizes import shape_of
from rewriter.trace.source import origin_of, user_names

SCATTERED = "written, because what follows reads each element at many places"


@dataclass(frozen=True, eq=False)
class Region:
    """A part of the graph that one chain replaces: `outputs` are computed from `inputs`, the nodes `inside` vanish.

    `kept` are wide inputs that the program makes and that are written all the same, with the reason. A `tentative`
    one may be a plain dense layer: it is fused only if its reductions depend on each other. `reducing` are those of
    its nodes that reduce; `passed` calls that hand on one of the tensors they read, and which; `following` is
    what has been taken into its epilogue, and `results` what it would write without.
    """

    program: Program
    outputs: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    inside: frozenset[fx.Node]
    wide: tuple[fx.Node, ...]
    display: dict[str, str]
    tentative: bool
    kept: dict[fx.Node, str]
    reducing: frozenset[fx.Node] = frozenset()
    passed: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    following: frozenset[fx.Node] = frozenset()
    results: frozenset[fx.Node] = frozenset()

    @property
    def hidden(self) -> frozenset[fx.Node]:
        """What follows, or is followed, and is not written."""
        return (self.following | self.results).difference(self.outputs)

    @property
    def materialised(self) -> list[Reason]:
        """What the kernel reads from memory though it is wide."""
        return [Reason(f"written to memory and read by the kernel ({why})", site_of(n)) for n, why in self.kept.items()]


@dataclass(frozen=True)
class LiftResult:
    """The regions found, and what was wide but stays eager, with the reason. `broadcast`: input dimensions that may
    be 1.
    """

    regions: tuple[Region, ...]
    unfused: tuple[Reason, ...]
    broadcast: frozenset[Dimension]


def lift(traced: TracedModule, left: frozenset[str] = frozenset()) -> LiftResult:
    """Finds every wide region of a traced module. left: names of nodes that follow no chain in its epilogue."""
    found = _lifted(traced, left)
    if is_in_order(traced.graph, found.regions):
        return found
    return _lifted(traced, left.union(n.name for r in found.regions for n in r.following))


def _lifted(traced: TracedModule, left: frozenset[str]) -> LiftResult:
    graph = traced.graph
    eager = {n for n in graph.nodes if n.name in left}
    local = lift_locally(graph)
    moving = moving_nodes(graph, traced)
    names = user_names(graph)
    regions: list[Region] = []
    for kind in Origins:
        taken = set().union(*({*r.inside, *r.outputs} for r in regions))
        many: set[fx.Node] = set()
        while True:
            tags = tag(graph, local, moving, taken | many, kind)
            cutter = Cutter(traced, local, tags, names, taken | eager)
            cut = _cut_all(cutter, len(regions), moving.given if kind in TENTATIVE else None)
            if not cutter.scattered:
                break
            many |= cutter.scattered
        regions += cut
        if kind is Origins.MOVING:
            reasons, written = tags.reasons | dict.fromkeys(many, SCATTERED), tags.written
    fused = set().union(*({*r.inside, *r.outputs} for r in regions))
    unfused = [Reason(r, site_of(n)) for n, r in reasons.items() if n not in fused or n in written]
    return LiftResult(tuple(regions), tuple(unfused), broadcast_dimensions(traced, local))


def _cut_all(cutter: Cutter, first: int, given: set[fx.Node] | None) -> list[Region]:
    """given: nodes that depend on the caller's tensors, where regions are tentative."""
    tentative, tags = given is not None, cutter.tags
    components = _components(tags, cutter.reads_of)
    stages = [s for roots in components for s in _stages(cutter.graph, roots, cutter.local, tags)]
    groups = [g for g in stages if cutter.saves(g)]
    if tentative:
        groups = [g for g in groups if cutter.holds_layer(g) and not any(cutter.has_features(r, given) for r in g)]
    groups.sort(key=lambda g: max(map(cutter.order.__getitem__, g)))
    later = [set().union(*groups[k + 1 :]) for k in range(len(groups))]
    cut = [cutter.cut(g, f"chain_{first + k}", tentative, later[k]) for k, g in enumerate(groups)]
    return [region for region in cut if region]


def site_of(node: fx.Node) -> Site | None:
    origin = origin_of(node)
    return Site(origin.file, origin.line) if origin.file else None


def moving_nodes(graph: fx.Graph, traced: TracedModule) -> Moving:
    """Nodes whose value depends on a tensor the caller gives, and those that are as long as one."""
    given: set[fx.Node] = set()
    names = {name for name in traced.inputs if name}
    for node in graph.nodes:
        is_value = isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))
        if node.name in names or (is_value and any(a in given for a in value_inputs(node))):
            given.add(node)
    return Moving(given, {n for n in graph.nodes if _is_long(n)} - given)


def _is_long(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return torch.is_tensor(value) and any(isinstance(n, torch.SymInt) for n in value.shape)


def _components(tags: Tags, reads_of) -> list[list[fx.Node]]:
    """Roots grouped by the wide values they share, in graph order."""
    parent: dict[fx.Node, fx.Node] = {}

    def find(n: fx.Node) -> fx.Node:
        while parent.setdefault(n, n) is not n:
            n = parent[n]
        return n

    wide = set(tags.wide)
    for node in [*tags.wide, *tags.roots]:
        for source in reads_of(node):
            if source in wide and source not in tags.stored:
                parent[find(node)] = find(source)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for root in [*tags.roots, *tags.written]:
        groups.setdefault(find(root), []).append(root)
    return list(groups.values())


def _stages(graph: fx.Graph, roots: list[fx.Node], local: dict[fx.Node, LocalLift], tags: Tags) -> list[list[fx.Node]]:
    """Roots in groups of which no one waits for an op that stays eager on another: each is a kernel of its own. So is
    what waits for a dense layer between: attention of two layers that share nothing but their bias.
    """
    stage: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before = [stage[s] for s in node.all_input_nodes if s in stage]
        if node in local and (before or node in roots):
            value = local[node].value
            is_layer = isinstance(value, Lifted) and contracts(value) and not tags.has_both_sides(node)
            waits = value is None or (is_layer and node not in roots)
            stage[node] = max(before, default=0) + (bool(before) and waits)
    groups: dict[int, list[fx.Node]] = {}
    for root in roots:
        groups.setdefault(stage[root], []).append(root)
    return list(groups.values())


class Cutter:
    """Inlines what a region computes and stops at what it reads. `scattered`: what it inlines at too many places."""

    def __init__(
        self,
        traced: TracedModule,
        local: dict[fx.Node, LocalLift],
        tags: Tags,
        names: dict[fx.Node, str],
        taken: Set[fx.Node] = frozenset(),
    ):
        self.graph, self.attributes, self.parameters = traced.graph, traced.attributes, traced.parameters
        self.local, self.tags, self.names = local, tags, names
        graph = traced.graph
        self.by_name = {n.name: n for n in graph.nodes}
        self.order = {n: k for k, n in enumerate(graph.nodes)}
        self.origins: dict[Node, Origin] = {}
        self.memo: dict[fx.Node, Lifted] = {}
        self.repeated = Repeated(traced.graph, local)
        self.widened = Widened(traced.graph, local)
        self.followers = Followers(traced.graph, local)
        self.taken = set(taken)
        self.places: dict[fx.Node, Place] = {}
        self.spread: set[fx.Node] = set()
        self.scattered: set[fx.Node] = set()

    def reads_of(self, node: fx.Node) -> list[fx.Node]:
        """The values a lifted node is computed from."""
        return [source for source, _ in sources(self.local[node].value, self.by_name)]

    def saves(self, roots: list[fx.Node]) -> bool:
        """Whether one kernel for the roots keeps something wide from being written: what they are computed from, or
        what an op like `scaled_dot_product_attention` writes inside.
        """
        held = [self.local[n].value.body for n in roots]
        return any(
            n in self.tags.wide and n not in self.tags.written for r in roots for n in self._wide_below(r)
        ) or any(isinstance(n, Reduce) and n.depth > 1 for body in held for n in walk(body))

    def holds_layer(self, roots: list[fx.Node]) -> bool:
        """Whether a dense layer is computed inside: one that is written anyway, normalised, is better computed once."""
        inside = set().union(*map(self._wide_below, roots))
        return bool(set(roots) - set(self.tags.written)) and bool(inside & self.tags.origins)

    def has_features(self, root: fx.Node, given: set[fx.Node]) -> bool:
        """Whether the outputs of a layer are its features: they weigh a summary that the caller's tensors give, or what
        positions were weighed into is multiplied along them by something else.

        softmax(q[n, d]) · (sum_n softmax_n(k[n, d]) v[n, e]) is linear attention, two narrow products.
        """
        axes = self.local[root].value.axes
        reads = sources(self.local[root].value, self.by_name)
        wide = [load for source, load in reads if self.tags.is_wide(source)]
        rows = frozenset(axes).intersection(*(load.free for load in wide))
        summed = {a for load in wide for a in load.free - frozenset(axes) if not is_dynamic(a)}
        if any(s in given and load.free & summed and not rows <= load.free for s, load in reads):
            return True
        left = inherited(self.local[root].value, reads, self.tags.dims)
        held = {root: tuple(frozenset([a]) if tags else frozenset() for a, tags in zip(axes, left))}
        for node in list(self.graph.nodes)[self.order[root] + 1 :]:
            lifted = self.local[node].value if node in self.local else None
            reads = sources(lifted, self.by_name) if isinstance(lifted, Lifted) else []
            if not any(source in held for source, _ in reads):
                continue
            if over_others(lifted, reads, held, self.by_name.values()):
                return True
            if call_name(node) in VIEWS:
                held[node] = inherited(lifted, reads, held)
        return False

    def _wide_below(self, root: fx.Node) -> set[fx.Node]:
        """The values of the region that a root is computed from."""
        found: set[fx.Node] = set()
        todo = [root]
        while todo:
            for source in self.reads_of(todo.pop()):
                if source not in found and source not in self.tags.stored and self.tags.has_both_sides(source):
                    found.add(source)
                    todo.append(source)
        return found

    def cut(self, roots: list[fx.Node], name: str, tentative: bool, later: set[fx.Node]) -> Region | None:
        """None where nothing outside reads what the roots lead to, or it is made of positions alone. later: roots of
        regions after this one.
        """
        self.origins, self.memo = {}, {}
        self.roots = set(roots)
        written = [n for n in roots if n in self.tags.written]
        grown = self._grown([n for n in roots if n not in self.tags.written], later)
        wide = set().union(*(self._wide_below(r) for r in roots), written)
        results = _live_outputs(grown, wide)
        after, made = self._follow(grown, results, wide, later)
        ends = _live_outputs([*grown, *after], wide)
        outputs, results = [*ends, *written], frozenset([*results, *written])
        if not outputs:
            return None
        self.claimed = self._between(roots, outputs) | self.roots | made
        lifted = [(n, v) for n, v in ((n, self._inlined(n)) for n in outputs) if not _is_made(v.body)]
        outputs = [n for n, _ in lifted]
        program = Program(name, tuple(self._output(n, v) for n, v in lifted), self.origins, self._lengths())
        if not outputs or not program.tensors:
            return None
        self.scattered |= scattered(program, {n: v for n, v in self.memo.items() if n in self.tags.origins})
        inside = frozenset(self.memo) - {n for n in self.memo if n.op == "placeholder"}
        inputs = tuple(dict.fromkeys(self.by_name[t.name] for t in program.tensors))
        wide = tuple(n for n in self.memo if self.tags.is_wide(n))
        kept = self._kept(inputs)
        display = self._display(inputs)
        inside -= set(inputs)
        self.taken |= inside.union(outputs)
        reducing, passed = self._reducing(inside.union(outputs)), passed_on(self.memo)
        found = program, tuple(outputs), inputs, inside, wide, display, tentative, kept, reducing, passed
        return Region(*found, frozenset(after).union(made), results)

    def cut_members(
        self,
        name: str,
        outputs: tuple[fx.Node, ...],
        members: frozenset[fx.Node],
        wide: tuple[fx.Node, ...],
        laid: Callable[[fx.Node, Lifted], Lifted],
    ) -> Region:
        """A region of given nodes, and of what is cheaper generated than read.

        laid: gives each value over the axes of the region.
        """
        self.origins, self.memo, self.claimed, self.places = {}, {}, set(members), {}
        lifted = [(n, laid(n, self._inlined(n)), shape_of(n.meta["val"])) for n in outputs]
        written = [replace(self._output(n, v), shape=shape if v.shape != shape else ()) for n, v, shape in lifted]
        origins = {laid(n, v).body: self.origins[v.body] for n, v in self.memo.items() if v.body in self.origins}
        program = Program(name, tuple(written), origins)
        inputs = tuple(dict.fromkeys(self.by_name[t.name] for t in program.tensors))
        inside = frozenset(n for n in self.memo if n.op != "placeholder") - set(inputs)
        reducing, passed = self._reducing(inside.union(outputs)), passed_on(self.memo)
        return Region(program, outputs, inputs, inside, wide, self._display(inputs), False, {}, reducing, passed)

    def _reducing(self, nodes: frozenset[fx.Node]) -> frozenset[fx.Node]:
        return frozenset(n for n in nodes if n in self.local and has_reduction(self.local[n].value.body))

    def _display(self, inputs: tuple[fx.Node, ...]) -> dict[str, str]:
        return {n.name: name for n, name in self.names.items()} | {n.name: self._shown(n) for n in inputs}

    def _shown(self, node: fx.Node) -> str:
        """The user's name for a tensor, or for what it is a view of; a parameter's own name."""
        while node not in self.names and node.op == "call_function" and call_name(node) in VIEWS:
            node = node.args[0]
        path = self.attributes.get(node.name)
        own = self.names.get(node) or self.parameters.get(node.name)
        return own or (path.name if path else node.name)

    def _lengths(self) -> frozenset[Node]:
        """The extents along which summaries sum."""
        summaries = [self.local[n].value.body for n in self.memo if n in self.tags.summaries]
        return frozenset(a.extent for n in walk(*summaries) if isinstance(n, Reduce) for a in n.axes)

    def _output(self, node: fx.Node, value: Lifted) -> Output:
        body = with_absorption_inside(value.body) if node in self.places else with_absorption(value.body)
        if value.body in self.origins:
            self.origins.setdefault(body, self.origins[value.body])
        output = Output(self.names.get(node, node.name), value.axes, body, node.meta["val"].dtype)
        return self.places[node].written(output) if node in self.places else output

    def _follow(
        self, grown: list[fx.Node], results: list[fx.Node], wide: set[fx.Node], later: set[fx.Node]
    ) -> tuple[list[fx.Node], set[fx.Node]]:
        """(arithmetic that follows the results, as far as no more is written for it; what is computed for that alone)"""
        outside = self._descendants([*grown, *later])
        closed = {*self.taken, *self._between(grown, grown), *wide, *self.tags.wide, *self.tags.stored}
        self.places = self.followers.places(results, outside, closed)
        after = list(filter(self.followers.is_arithmetic, self.places))
        while after and not self.followers.is_no_larger(results, _live_outputs([*grown, *after], wide), self.places):
            after.pop()
        return after, self.followers.made_for(set(after), closed | outside)

    def _grown(self, roots: list[fx.Node], later: set[fx.Node]) -> list[fx.Node]:
        """Follows pointwise ops and views that join several results of the region: `acc / l[:, None]`. What joins
        them with results of a later one belongs to that.
        """
        reached: dict[fx.Node, frozenset[fx.Node]] = {r: frozenset([r]) for r in roots}
        outside = self._descendants([*roots, *later])
        for node in self.graph.nodes:
            if node in reached or not self._joins(node, reached, outside):
                continue
            reached[node] = frozenset().union(*(reached[s] for s in node.all_input_nodes if s in reached))
        joins = [n for n, origin in reached.items() if self._is_join(n, reached)]
        return list(dict.fromkeys([*roots, *joins]))

    def _is_join(self, node: fx.Node, reached) -> bool:
        inputs = [reached[s] for s in node.all_input_nodes if s in reached]
        return len(inputs) > 1 and any(a != b for a in inputs for b in inputs)

    def _joins(self, node: fx.Node, reached, outside: set[fx.Node]) -> bool:
        """Pointwise or a view, over the region's results and values that do not come after them."""
        value = self.local[node].value if node in self.local else None
        if not isinstance(value, Lifted) or has_reduction(value.body):
            return False
        sources = node.all_input_nodes
        return any(s in reached for s in sources) and all(s in reached or s not in outside for s in sources)

    def _descendants(self, roots: list[fx.Node]) -> set[fx.Node]:
        out = set(roots)
        for node in self.graph.nodes:
            if any(s in out for s in node.all_input_nodes):
                out.add(node)
        return out

    def _between(self, roots: list[fx.Node], outputs: list[fx.Node]) -> set[fx.Node]:
        """Nodes on a path from a root to an output."""
        after = self._descendants(roots)
        inside, todo = set(), [n for n in outputs]
        while todo:
            node = todo.pop()
            if node in after and node not in inside:
                inside.add(node)
                todo += node.all_input_nodes
        return inside

    def _inlined(self, node: fx.Node) -> Lifted:
        if node not in self.memo:
            local, place = self.local[node].value, self.places.get(node)
            body = self._followed(local, place) if place else self._expanded(local, node)
            origin = origin_of(node)
            self.memo[node] = Lifted(place.along if place else local.axes, body)
            self.origins.setdefault(body, Origin(origin.file, origin.line, origin.text, self.names.get(node, "")))
        return self.memo[node]

    def _followed(self, local: Lifted, place: Place) -> Node:
        """What follows a result, over the axes of that."""

        def rule(n: Node) -> Node:
            source = self.by_name.get(n.tensor.name) if isinstance(n, Load) else None
            if source in self.places or source is place.result:
                return self._inlined(source).body
            return self._inlined(source).at(n.index) if source and self._goes_inside(source, False) else n

        return transform(substitute(local.body, place.back), rule)

    def _expanded(self, local: Lifted, node: fx.Node) -> Node:
        is_pooled = node in self.tags.pooled  # of operands that are narrow, whatever they have
        sides = {} if is_pooled else dict(zip(local.axes, self.tags.dims.get(node, ())))
        everything = frozenset(a for a in local.axes if index(a).free)

        def rule(n: Node) -> Node:
            if not isinstance(n, Load) or n.tensor.name not in self.by_name:
                return n
            source = self.by_name[n.tensor.name]
            is_wide = _has_both(n, sides) or (node in self.spread and not is_pooled and everything <= n.free)
            is_spread = is_wide and covers(n, n.free)
            if is_spread:
                self.spread.add(source)
            return self._inlined(source).at(n.index) if self._goes_inside(source, is_spread) else n

        return transform(local.body, rule)

    def _goes_inside(self, source: fx.Node, is_spread: bool) -> bool:
        """Whether a value read by the region is computed in it rather than loaded; `is_spread`: over what is wide."""
        if source in self.claimed or self.tags.is_wide(source):
            return True
        if source in self.tags.stored:
            return False
        local = self.local[source].value if source in self.local else None
        if not isinstance(local, Lifted):
            return False
        if has_reduction(local.body):
            return is_spread and self.repeated.contracts(local)
        return is_spread or self.repeated.is_cheaper(source) or self.widened.is_read_narrow(source)

    def _kept(self, inputs: tuple[fx.Node, ...]) -> dict[fx.Node, str]:
        """Why a wide value is written: what no kernel expresses, or would have to repeat."""
        kept = [n for n in inputs if n in self.spread and n in self.local]
        return {n: self.local[n].reason or f"{n.target}: computed once for all who read it" for n in kept}


def _has_both(load: Load, sides) -> bool:
    tags = frozenset().union(frozenset(), *(sides.get(a, frozenset()) for a in load.free))
    return any((o, "rows") in tags and (o, "stream") in tags for o, _ in tags)


def _live_outputs(nodes: list[fx.Node], wide: set[fx.Node]) -> list[fx.Node]:
    """Those that something outside the others, and outside the region's wide values, reads."""
    inside: set[fx.Node] = set()  # nodes all of whose uses end in another result of the region, or in what is wide
    for node in reversed(nodes[0].graph.nodes if nodes else ()):
        leads_back = bool(node.users) and node.op != "output" and all(u in inside for u in node.users)
        if node in wide or node in nodes or leads_back:
            inside.add(node)
    return [n for n in nodes if any(u not in inside for u in n.users)]


def _is_made(body: Node) -> bool:
    """A value of positions alone: PyTorch makes it, where something outside of the region reads it."""
    return not any(isinstance(n, (Load, Reduce)) for n in walk(body))
