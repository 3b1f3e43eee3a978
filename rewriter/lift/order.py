"""Whether regions can run one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import fx

if TYPE_CHECKING:
    from rewriter.lift.region import Region


def is_in_order(graph: fx.Graph, regions: Iterable[Region]) -> bool:
    """Whether each can wait for all that it reads, and nothing else reads what an epilogue keeps to itself."""
    regions = tuple(regions)
    of = {n: r for r in regions for n in r.outputs}
    hidden = frozenset().union(*(r.hidden for r in regions)) - of.keys()
    done: set[object] = set()
    busy: set[object] = set()
    todo: list[tuple[fx.Node, bool]] = [(n, False) for n in graph.nodes if n.op == "output"]
    while todo:
        node, is_left = todo.pop()
        unit = of.get(node, node)
        if is_left:
            busy.discard(unit)
            done.add(unit)
        elif unit in busy or unit in hidden:
            return False
        elif unit not in done:
            busy.add(unit)
            todo.append((node, True))
            todo += [(n, False) for n in (of[node].inputs if node in of else node.all_input_nodes)]
    return True
