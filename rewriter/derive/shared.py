"""Inner reductions that a program and its chain share: in a proof they are tensors like any other.

q · k over 128 features is the same node on both sides. What holds for every value that it may have holds for its own,
and needs none of the 128 products. Relations between a reduction and what it is made of are lost: a proof that fails
may succeed where nothing is taken for a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

from rewriter.ir import Axis, Const, Index, Node, Reduce, index, substitute, walk

WIDE = 16  # what is narrower costs no more than its values drawn


@lru_cache(maxsize=4096)
def form_of(node: Reduce) -> tuple[Node, tuple[Axis, ...]]:
    """A reduction with its free axes renamed by the order in which they occur, and those axes: equal forms are equal
    functions of them.
    """
    free = dict.fromkeys(n.axis for n in walk(node) if isinstance(n, Index) and n.axis in node.free)
    renamed = {a: index(Axis(f"free{k}", a.extent)) for k, a in enumerate(free)}
    return substitute(node, renamed), tuple(free)


def shared_forms(program: Iterable[Node], chain: Iterable[Node]) -> frozenset[Node]:
    """The forms of wide floating reductions that occur in both."""
    ours, theirs = ({form_of(n)[0] for n in walk(*roots) if _is_wide(n)} for roots in (program, chain))
    return frozenset(ours & theirs)


def _is_wide(node: Node) -> bool:
    if not isinstance(node, Reduce) or not node.dtype.is_floating_point:
        return False
    extents = [a.extent for a in node.axes]
    return all(isinstance(e, Const) for e in extents) and math.prod(e.value for e in extents) >= WIDE
