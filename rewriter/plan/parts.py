"""Which kernel computes what: definitions over the same rows share one, the others read its results from memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace

import torch

from rewriter.derive import Chain, Definition
from rewriter.derive.factors import as_product, depends_on
from rewriter.ir import (
    Axis,
    Load,
    Node,
    Output,
    Reduce,
    Ref,
    Tensor,
    apply,
    const,
    index,
    open_reduce,
    transform,
    walk,
    where,
)


@dataclass
class Part:
    """What one kernel computes: `rows` are the axes of its programs, features aside."""

    rows: frozenset[Axis]
    definitions: list[Definition] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)


def parts_of(chain: Chain, groups: dict[str, int] | None = None) -> list[Part]:
    """The parts of a chain in an order in which they can run; definitions of different `groups` share none."""
    return _Partition(chain, groups or {}).parts


def independent_groups(chain: Chain, parts: list[Part]) -> dict[str, int]:
    """The group of each definition: within a part, those that read each other or the same contraction belong together.

    Two softmaxes over one stream, each with scores of its own, are two groups.
    """
    groups: dict[str, int] = {}
    for part in parts:
        touched: list[tuple[set[object], list[str]]] = []
        for definition in part.definitions:
            things, names = _things(definition, {d.name for d in part.definitions}), [definition.name]
            for other in [t for t in touched if t[0] & things]:
                touched.remove(other)
                things, names = things | other[0], other[1] + names
            touched.append((things, names))
        for _, names in touched:
            groups |= dict.fromkeys(names, len(set(groups.values())))
    return groups


def deep_groups(chain: Chain, rows: frozenset[Axis]) -> dict[str, int]:
    """The group of each definition, where some weigh values that each of the rows has for itself, and others none.

    sum_n weights[m, n] · z[m, n, e] is one of the first.
    """
    features = features_of(chain)
    deep = {d.name for d in chain.definitions if is_deep(d, rows, features) and _stands_alone(d)}
    groups = {d.name: int(d.name in deep) for d in chain.definitions}
    return groups if len(set(groups.values())) > 1 else {}


def is_deep(definition: Definition, rows: frozenset[Axis], features: frozenset[Axis]) -> bool:
    """Whether something that is summed has rows, positions of the stream and features at once."""
    factors = factors_of(definition)
    return any(f.free & features and f.free & rows and depends_on(f, definition.stream) for f in factors)


def _stands_alone(definition: Definition) -> bool:
    """Whether a sum needs no other as it runs, but the maximum below which its exponentials are."""
    return (
        definition.centre is None and definition.extremum is None and not (definition.shift and definition.shift.mass)
    )


def _things(definition: Definition, names: set[str]) -> set[object]:
    """What ties a definition to others: its value, those of `names` it reads, contractions, else done again."""
    nodes = list(walk(*definition.roots))
    read = {n.name for n in nodes if isinstance(n, Ref)} & names
    return {definition.name, *read, *(n for n in nodes if isinstance(n, Reduce) and n.depth == 1)}


class _Partition:
    def __init__(self, chain: Chain, groups: dict[str, int]):
        self.chain = chain
        self.groups = groups
        self.features = features_of(chain)
        self.parts: list[Part] = []
        self.place: dict[str, int] = {}
        for definition in chain.definitions:
            self._add_definition(definition)
        for output in chain.outputs:
            self._add_output(output)

    def _rows(self, axes: tuple[Axis, ...]) -> frozenset[Axis]:
        return frozenset(a for a in axes if index(a).free) - self.features

    def _add_definition(self, definition: Definition) -> None:
        rows = self._rows(definition.axes)
        first = self._earliest(definition.roots, rows)
        open_parts = (k for k in range(first, len(self.parts)) if self._shares(k, rows, definition.stream))
        at = next((k for k in open_parts if self._in_group(k, definition)), None)
        if at is None:
            at = len(self.parts)
            self.parts.append(Part(rows))
        part = self.parts[at]
        part.rows = part.rows | rows
        part.definitions.append(definition)
        self.place[definition.name] = at

    def _shares(self, at: int, rows: frozenset[Axis], stream: Axis) -> bool:
        """Whether a part's programs have the rows, or would with a few axes more."""
        own = self.parts[at].rows
        streams = {stream, *(d.stream for d in self.parts[at].definitions)}
        return (own <= rows or rows <= own) and not (own | rows) & streams

    def _in_group(self, at: int, definition: Definition) -> bool:
        group = self.groups.get(definition.name)
        return all(self.groups.get(d.name) == group for d in self.parts[at].definitions)

    def _earliest(self, nodes: tuple[Node, ...], rows: frozenset[Axis]) -> int:
        """The first part in which all that is read is at hand: in registers, at the same rows, or in memory."""
        first = 0
        for ref in {n for n in walk(*nodes) if isinstance(n, Ref)}:
            read = self.chain.definition(ref.name)
            at_hand = ref.index == read.ref.index and self._rows(read.axes) <= rows
            first = max(first, self.place[ref.name] + (0 if at_hand else 1))
        return first

    def _add_output(self, output: Output) -> None:
        rows = self._rows(output.over)
        first = self._earliest((output.body,), rows)
        for at in range(first, len(self.parts)):
            part = self.parts[at]
            streams = {d.stream for d in part.definitions}
            if rows <= part.rows or len(rows - part.rows) == 1 and rows - part.rows <= streams and part.rows <= rows:
                part.outputs.append(output)
                return
        self.parts.append(Part(rows, [], [output]))


def features_of(chain: Chain) -> frozenset[Axis]:
    """Axes that of all that is streamed only the last operand (the values) carries: kept whole in a tile."""
    return frozenset(own[-1] for own in carried(chain).values())


def carried(chain: Chain) -> dict[tuple[Axis, ...], list[Axis]]:
    """For the axes of sums those that no weight has, only the values. Those of a sum that others are sums over, too,
    with an axis more, are rows of both: sum_n w[m, n], sum_n w[m, n] v[n, e]
    """
    others = _scored(chain) | _everywhere(chain)
    streams = {d.stream for d in chain.definitions}
    own = {d.axes: [a for a in d.axes if a not in others and a not in streams] for d in chain.definitions}
    rows = {axes for axes in own for more in own if set(axes) < set(more) and own[more] and own[more][-1] not in axes}
    return {axes: found for axes, found in own.items() if found and axes not in rows}


def _everywhere(chain: Chain) -> frozenset[Axis]:
    """Axes that all that is streamed carries: they tell rows apart, and no weight is shared along them."""
    streamed = [n.free for d in chain.definitions for n in _parts(d) if depends_on(n, d.stream)]
    return frozenset.intersection(*streamed) if streamed else frozenset()


def _parts(definition: Definition) -> tuple[Node, ...]:
    """What a reduction multiplies, and where it does."""
    exponent = (definition.shift.exponent,) if definition.shift else ()
    return (definition.predicate, *exponent, *(factors_of(definition) or (definition.body,)))


def _scored(chain: Chain) -> frozenset[Axis]:
    """Axes on which weights depend."""
    scored: frozenset[Axis] = frozenset()
    for d in chain.definitions:
        scored |= d.predicate.free
        opened = {f for f in d.rest if is_weighted(f)}
        roots = [r for r in d.roots if r is not d.body or not opened]
        inner = (n for n in walk(*roots, *factors_of(d)) if isinstance(n, Reduce) and n not in opened)
        scored |= frozenset().union(*(n.free for n in inner))
        scored |= frozenset().union(*(_scored_by(f, d.stream) for f in factors_of(d)))
        if d.shift:
            scored |= d.shift.exponent.free | d.shift.phi.free
        if d.op != "sum":
            scored |= d.body.free
    return scored


def _scored_by(factor: Node, stream: Axis) -> frozenset[Axis]:
    """The axes of a weight; of values those that no tensor along the stream has beside it: m of exp(x[m] - y[n])"""
    if not is_operand(factor, stream):
        return factor.free
    read = [n for n in walk(factor) if isinstance(n, (Load, Ref)) and depends_on(n, stream)]
    entries = (e for n in read for e in n.index if not depends_on(e, stream))
    return factor.free - frozenset().union(*(e.free for e in entries))


def is_weighted(factor: Node) -> bool:
    """A sum over a short axis of weights that are computed, and what they weigh: sum_g exp(s[m, n, g]) · v[n, g, e]"""
    if not isinstance(factor, Reduce) or factor.op != "sum" or len(factor.axes) > 1:
        return False
    return any(isinstance(n, (Reduce, Ref)) for n in walk(factor.body))


def factors_of(definition: Definition) -> tuple[Node, ...]:
    """What a sum multiplies, with that of a weighted sum inside it."""
    out: list[Node] = []
    for factor in definition.rest:
        if not is_weighted(factor):
            out.append(factor)
            continue
        _, predicate, body = open_reduce(factor)
        product = as_product(body)
        out += [predicate, product.predicate, *product.over, *product.under]
    return tuple(out)


def is_operand(factor: Node, stream: Axis) -> bool:
    """A factor read from memory along the stream, as given or as an earlier kernel has left it there: the values of a
    weighted sum.
    """
    own = (isinstance(n, Reduce) or isinstance(n, Ref) and not depends_on(n, stream) for n in walk(factor))
    return not any(own) and depends_on(factor, stream)


def chains_of(chain: Chain, parts: list[Part]) -> tuple[list[Chain], tuple[Tensor, ...]]:
    """Each part as a chain of its own, reading earlier parts' results as tensors and giving its own as outputs."""
    results: dict[str, Tensor] = {}
    bodies = [_reading_results(chain, part, results) for part in parts]
    return [_giving_results(own, results) for own in bodies], tuple(results.values())


def _reading_results(chain: Chain, part: Part, results: dict[str, Tensor]) -> Chain:
    own = {d.name: d.body.dtype for d in part.definitions}

    def rule(n: Node) -> Node:
        if not isinstance(n, Ref):
            return n
        if n.name in own:
            return replace(n, dtype=own[n.name])
        return Load(results.setdefault(n.name, result_of(chain.definition(n.name))), n.index)

    def moved(node: Node) -> Node:
        return transform(node, rule)

    definitions = []
    for definition in part.definitions:
        definitions.append(moved_definition(_settled(definition, own), moved))
        own[definition.name] = definitions[-1].body.dtype  # as it is held, where it is all that is reduced
    outputs = tuple(replace(o, body=moved(o.body)) for o in part.outputs)
    return replace(chain, definitions=tuple(definitions), outputs=outputs)


def _settled(definition: Definition, own: Container[str]) -> Definition:
    """exp(exponent − phi), and exponent − phi where a moment has it, as factors where phi is that of an earlier kernel:
    it is final.
    """
    shift = definition.shift
    if shift is None or shift.state.name in own:
        return definition
    phi = where(apply("eq", shift.phi, const(-math.inf)), const(0.0), shift.phi)
    gap = apply("sub", shift.exponent, phi)
    factors = (apply("exp", gap), gap) if shift.mass else (apply("exp", gap),)
    return replace(definition, shift=None, rest=(*factors, *definition.rest))


def moved_definition(definition: Definition, moved: Callable[[Node], Node]) -> Definition:
    shift, centre = definition.shift, definition.centre
    if shift:
        shift = replace(shift, phi=moved(shift.phi), exponent=moved(shift.exponent), mass=_moved_ref(shift.mass, moved))
    if centre:
        first = _moved_ref(centre.first, moved)
        centre = replace(centre, mean=moved(centre.mean), mass=_moved_ref(centre.mass, moved), first=first)
    return replace(
        definition,
        predicate=moved(definition.predicate),
        rest=tuple(map(moved, definition.rest)),
        shift=shift,
        body=moved(definition.body),
        extremum=_moved_ref(definition.extremum, moved),
        centre=centre,
    )


def _moved_ref(ref: Ref | None, moved: Callable[[Node], Node]) -> Ref | None:
    """A running value; itself where it is read from memory by then."""
    new = ref and moved(ref)
    return new if isinstance(new, Ref) else ref


def _giving_results(chain: Chain, results: dict[str, Tensor]) -> Chain:
    given = tuple(result_output(d, results[d.name]) for d in chain.definitions if d.name in results)
    return replace(chain, outputs=(*given, *chain.outputs))


def result_output(definition: Definition, result: Tensor) -> Output:
    return Output(result.name, definition.axes, replace(definition.ref, final=True), result.dtype)


def result_of(definition: Definition) -> Tensor:
    """Where a definition's final values are kept for kernels after its own."""
    dtype = definition.body.dtype
    held = torch.float32 if dtype.is_floating_point else dtype
    return Tensor(definition.name, tuple(a.extent for a in definition.axes), held)
