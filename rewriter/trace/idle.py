"""Calls that change nothing: what in-place ops leave behind once they are made functional."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def without_idle(graph: fx.Graph) -> None:
    """x[:] → x        x[:] = y → y        copy(x, y) → y where y has the shape and type of x

    What the graph returns stays: a view of a tensor is not that tensor.
    """
    for node in list(graph.nodes):
        same = _same_as(node)
        if same is not None and not any(u.op == "output" for u in node.users):
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _same_as(node: fx.Node) -> fx.Node | None:
    match node.target:
        case aten.slice.Tensor if _is_whole(node.args[0], *node.args[1:]):
            return node.args[0]
        case aten.slice_scatter.default if _is_whole(node.args[0], *node.args[2:]):
            return node.args[1]
        case aten.copy.default if _is_alike(*node.args[:2]):
            return node.args[1]
    return None


def _is_whole(x: fx.Node, dim: int = 0, start=None, end=None, step: int = 1) -> bool:
    size = x.meta["val"].shape[dim]
    last = isinstance(end, int) and (end == torch.iinfo(torch.int64).max or (isinstance(size, int) and end >= size))
    return step == 1 and start in (None, 0) and (end is None or last)


def _is_alike(x: fx.Node, y) -> bool:
    if not isinstance(y, fx.Node):
        return False
    held, new = x.meta["val"], y.meta["val"]
    return held.dtype == new.dtype and [str(n) for n in held.shape] == [str(n) for n in new.shape]
