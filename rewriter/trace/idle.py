"""Calls that change nothing: what in-place ops leave behind once they are made functional."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten


def without_idle(graph: fx.Graph) -> None:
    """x[:] → x        x[:] = y → y        copy(x, y) → y where y has the shape and type of x
    x.view(a).view(x.shape) → x        (x[a:b] = y)[a:b] → y        alias(x) → x
    x.to(dtype) → x where x is of that type

    What the graph returns stays: a view of a tensor is not that tensor.
    """
    for node in list(graph.nodes):
        same = _same_as(node)
        if same is not None and not any(u.op == "output" for u in node.users):
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def loosen_views(graph: fx.Graph) -> None:
    """x.view(b, n, c) → x.reshape(b, n, c)

    A `contiguous()` before it that changed nothing in the example is gone from the graph; at other sizes or strides it
    would have.
    """
    for node in graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default


def _same_as(node: fx.Node) -> fx.Node | None:
    match node.target:
        case aten.slice.Tensor if _is_whole(node.args[0], *node.args[1:]):
            return node.args[0]
        case aten.slice.Tensor if _reads_back(node):
            return node.args[0].args[1]
        case aten.view.default if _is_view(node.args[0]) and _is_alike(node.args[0].args[0], node):
            return node.args[0].args[0]
        case aten.alias.default:
            return node.args[0]
        case aten.to.dtype if len(node.args) == 2 and not node.kwargs and _is_of_type(*node.args):
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


def _reads_back(node: fx.Node) -> bool:
    """Whether a slice is the one that was written last."""
    written = node.args[0]
    if written.target is not aten.slice_scatter.default or node.kwargs or written.kwargs:
        return False
    return _slice(*node.args[1:]) == _slice(*written.args[2:]) and _is_alike(written.args[1], node)


def _slice(dim: int = 0, start=None, end=None, step: int = 1) -> tuple:
    return dim, start or 0, torch.iinfo(torch.int64).max if end is None else end, step


def _is_of_type(x: fx.Node, dtype: torch.dtype) -> bool:
    return x.meta["val"].dtype is dtype


def _is_view(x: fx.Node) -> bool:
    return x.target is aten.view.default


def _is_alike(x: fx.Node, y) -> bool:
    if not isinstance(y, fx.Node):
        return False
    held, new = x.meta["val"], y.meta["val"]
    return held.dtype == new.dtype and [str(n) for n in held.shape] == [str(n) for n in new.shape]
