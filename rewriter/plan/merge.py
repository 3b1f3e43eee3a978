"""Axes that only values carry, written as one: a product of tiles for all of them at once.

    o[m, p, c] = sum_n w[m, n] · v[n, p, c]   →   o[m, f // 3, f % 3] = sum_n w[m, n] · v[n, f // 3, f % 3]

Otherwise the last alone is kept whole in a tile, and weights are computed again for every position of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rewriter.derive import Chain
from rewriter.ir import Axis, Const, Load, Node, Output, Ref, Tensor, apply, const, fresh_axis, index, substitute, walk
from rewriter.ir import transform as rewritten
from rewriter.plan.parts import carried, moved_definition
from rewriter.plan.roles import MAX_FEATURE


def merged(chain: Chain) -> Chain:
    """The chain with the axes of known extents that only values carry made one, while a tile can hold them."""
    while pair := next((p for p in _pairs(chain) if _fits(*p)), None):
        chain = _merge(chain, *pair)
    return chain


def _fits(outer: Axis, inner: Axis) -> bool:
    extents = outer.extent, inner.extent
    return all(isinstance(e, Const) for e in extents) and extents[0].value * extents[1].value <= MAX_FEATURE


def _pairs(chain: Chain) -> Iterator[tuple[Axis, Axis]]:
    """(outer, inner): the last two of the axes that a sum has for its values, wherever either is so has the other."""
    for own in carried(chain).values():
        varying = [a for a in own if index(a).free]
        if len(varying) > 1 and _is_together(chain, *varying[-2:]):
            yield varying[-2], varying[-1]


def _is_together(chain: Chain, outer: Axis, inner: Axis) -> bool:
    together = {outer, inner}
    axes = [d.axes for d in chain.definitions] + [o.axes for o in chain.outputs]
    made = {d.name for d in chain.definitions if together & set(d.axes)}
    refs = [n for n in walk(*chain.roots) if isinstance(n, Ref) and (n.free & together or n.name in made)]
    streams = {d.stream for d in chain.definitions}
    return (
        not together & streams
        and all(len(together & set(a)) != 1 for a in axes)
        and all({index(outer), index(inner)} <= set(n.index) for n in refs)
        and not any(o.shape for o in chain.outputs if together & set(o.axes))
    )


def _merge(chain: Chain, outer: Axis, inner: Axis) -> Chain:
    assert isinstance(outer.extent, Const) and isinstance(inner.extent, Const)
    both = fresh_axis(const(outer.extent.value * inner.extent.value, inner.extent.dtype), "e")
    at = index(both)
    by = {outer: apply("floordiv", at, inner.extent), inner: apply("mod", at, inner.extent)}

    def axes_of(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return tuple(both if a is inner else a for a in axes if a is not outer)

    def of_state(node: Node) -> Node:
        if not isinstance(node, Ref) or index(inner) not in node.index:
            return node
        return replace(node, index=tuple(at if i is index(inner) else i for i in node.index if i is not index(outer)))

    def moved(node: Node) -> Node:
        return substitute(rewritten(node, of_state), by)

    def of_output(output: Output) -> Output:
        position = tuple(substitute(p, by) for p in output.position)
        return replace(output, body=moved(output.body), at=position if inner in output.axes else output.at)

    definitions = tuple(replace(moved_definition(d, moved), axes=axes_of(d.axes)) for d in chain.definitions)
    outputs = tuple(map(of_output, chain.outputs))
    return _seen_merged(
        replace(chain, axes=axes_of(chain.axes), definitions=definitions, outputs=outputs),
        (by[outer], by[inner]),
        at,
    )


def _seen_merged(chain: Chain, pair: tuple[Node, Node], at: Node) -> Chain:
    """v[n, f // 3, f % 3]  →  v'[n, f]   where v' is v seen with the two dimensions as one, and is read so alone

    They lie together in memory, as far as the last is dense: elsewhere it is a copy.
    """
    reads: dict[Tensor, set[int | None]] = {}
    for load in (n for n in walk(*chain.roots) if isinstance(n, Load)):
        reads.setdefault(load.tensor, set()).add(_pair_at(load, pair, at.axis.extent))
    places = {t: found.pop() for t, found in reads.items() if len(found) == 1 and None not in found}

    def seen(node: Node) -> Node:
        if not isinstance(node, Load) or node.tensor not in places:
            return node
        tensor, k = node.tensor, places[node.tensor]
        shape = (*tensor.shape[:k], at.axis.extent, *tensor.shape[k + 2 :])
        new = replace(tensor, shape=shape, given=tensor.given or tensor.shape, lanes=k)
        return Load(new, (*node.index[:k], at, *node.index[k + 2 :]))

    def moved(node: Node) -> Node:
        return rewritten(node, seen)

    definitions = tuple(moved_definition(d, moved) for d in chain.definitions)
    outputs = tuple(replace(o, body=moved(o.body)) for o in chain.outputs)
    return replace(chain, definitions=definitions, outputs=outputs) if places else chain


def _pair_at(load: Load, pair: tuple[Node, Node], extent: Node) -> int | None:
    """Which of its dimensions is the first of the pair, where the second follows and is dense, and both are whole."""
    tensor = load.tensor
    if not tensor.lanes or load.index[tensor.lanes - 1 : tensor.lanes + 1] != pair:
        return None
    is_whole = apply("mul", *tensor.shape[tensor.lanes - 1 : tensor.lanes + 1]) == extent
    return tensor.lanes - 1 if is_whole else None
