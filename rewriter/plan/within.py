"""Values that are read only where a predicate holds, written as they are there.

{n | n < m + 1}: q[(m·M + n + M) // (M + 1), d]   →   {n | n < m + 1}: q[m, d]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rewriter.derive import Chain, Definition
from rewriter.ir import Apply, Axis, Load, Node, Ref, fresh_axis, index, substitute, walk
from rewriter.plan.parts import moved_definition
from rewriter.sparsity import support_of


def within(chain: Chain) -> tuple[Chain, dict[Node, Node]]:
    """The chain with what it reduces as it is below the ends that predicates set to streams, and its nodes as they were."""
    was: dict[Node, Node] = {}
    definitions = tuple(_within(d, was) for d in chain.definitions)
    return replace(chain, definitions=definitions), was


def _within(definition: Definition, was: dict[Node, Node]) -> Definition:
    stream, read = definition.stream, definition.roots[1:]
    end = support_of(definition.predicate, stream).outer.upper
    if end is None or not end.free or not _is_affine(end):
        return definition
    if not any(divides(n) and stream in n.free for n in walk(*read)):
        return definition
    below = _below(stream, end)
    was |= {new: n for n in walk(*read) if (new := below(n)) is not n and new.children}
    return replace(moved_definition(definition, below), predicate=definition.predicate)


def _below(stream: Axis, end: Node) -> Callable[[Node], Node]:
    """A node as it is at positions below an end: that of an axis as long, at whose positions it is built again."""
    short = fresh_axis(end, stream.name)
    return lambda node: substitute(substitute(node, {stream: index(short)}), {short: index(stream)})


def _is_affine(end: Node) -> bool:
    return not any(isinstance(n, (Load, Ref)) or divides(n) for n in walk(end))


def divides(node: Node) -> bool:
    """Whether it is a quotient or a rest of whole numbers."""
    return isinstance(node, Apply) and node.op in ("floordiv", "mod") and not node.dtype.is_floating_point
