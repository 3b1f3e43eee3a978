"""The user's line for a node, found again after rewriting: nodes are looked up without the names of their axes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from rewriter.ir import Axis, Index, Node, Origin, substitute, walk


@dataclass(frozen=True)
class Shown:
    """`source` is the comment above a statement, `name` the user's variable."""

    source: str
    name: str


def skeleton(node: Node) -> Node:
    """The node with its free axes numbered in order of appearance."""
    order = dict.fromkeys(n.axis for n in walk(node) if isinstance(n, Index) and n.axis in node.free)
    return substitute(node, {a: Index(Axis(f"${k}", a.extent)) for k, a in enumerate(order)})


class Origins:
    """Looks up where a node comes from. `was`: what a kernel has moved to other axes, as it was."""

    def __init__(self, origins: dict[Node, Origin], was: Mapping[Node, Node] = MappingProxyType({})):
        self.was = was
        self.table: dict[Node, Origin] = {}
        for node, origin in origins.items():
            if origin.line:
                self.table.setdefault(skeleton(node), origin)

    def of(self, node: Node) -> Shown | None:
        origin = self.table.get(skeleton(self.was.get(node, node)))
        if origin is None:
            return None
        return Shown(f"{os.path.basename(origin.file)}:{origin.line}  {origin.text}", origin.name)
