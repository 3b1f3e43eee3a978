"""16-bit operands that a program widens before it multiplies them: `q.float() @ k.float().mT`.

Products of 16-bit numbers are exact in fp32, in which they are summed either way: float32(q) · float32(k) → q · k. Where
nothing but such products reads them, operands are loaded as they are stored, and no wider copy is made.
"""

from __future__ import annotations

import torch
from torch import fx

from rewriter.ir import Apply, Load, Node, Reduce, walk
from rewriter.lift.local import LocalLift
from rewriter.lift.values import Lifted

NARROW = (torch.float16, torch.bfloat16)


class Widened:
    """Which values of a graph are so."""

    def __init__(self, graph: fx.Graph, local: dict[fx.Node, LocalLift]):
        self.local = local
        self.by_name = {n.name: n for n in graph.nodes}

    def is_read_narrow(self, node: fx.Node) -> bool:
        """Whether a value is a widened tensor, or a view of one, and only multiplied by others that are."""
        root = self._widening(node)
        return root is not None and all(map(self._multiplies_widened, self._readers(root)))

    def _widening(self, node: fx.Node) -> fx.Node | None:
        """The conversion of which a value is a view."""
        body = self._body(node)
        if isinstance(body, Load):
            return self._widening(self.by_name[body.tensor.name]) if body.tensor.name in self.by_name else None
        is_wider = isinstance(body, Apply) and body.op == "cast" and body.dtype is torch.float32
        return node if is_wider and isinstance(body.args[0], Load) and body.args[0].dtype in NARROW else None

    def _readers(self, node: fx.Node) -> list[fx.Node]:
        """What reads a value, or a view of it."""
        views = [u for u in node.users if isinstance(self._body(u), Load)]
        return [u for u in node.users if u not in views] + [r for v in views for r in self._readers(v)]

    def _multiplies_widened(self, reader: fx.Node) -> bool:
        body = self._body(reader)
        sums = [n for n in walk(body) if isinstance(n, Reduce)] if body is not None else []
        if len(sums) != 1 or sums[0].op != "sum" or getattr(sums[0].body, "op", "") != "mul":
            return False
        operands = [self.by_name.get(n.tensor.name) for n in sums[0].body.args if isinstance(n, Load)]
        return len(operands) == 2 and all(n and self._widening(n) for n in operands)

    def _body(self, node: fx.Node) -> Node | None:
        value = self.local[node].value if node in self.local else None
        return value.body if isinstance(value, Lifted) else None
