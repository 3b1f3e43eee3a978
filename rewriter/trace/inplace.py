"""Rewrites in-place ops on a graph to their functional twins, where that is the same thing.

    y = x.exp(); y.mul_(2); z = y + 1   →   y = x.exp(); y1 = y.mul(2); z = y1 + 1
"""

from __future__ import annotations

import torch
from torch import fx

from rewriter.errors import RewriteError, Site
from rewriter.trace.source import origin_of


def without_inplace(graph: fx.Graph) -> None:
    """Replaces each in-place call. Raises RewriteError where the changed tensor is shared with a view or an input."""
    for node in list(graph.nodes):
        if _is_inplace(node):
            _functionalise(graph, node)
    graph.lint()


def _is_inplace(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = node.target._schema.arguments
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write


def _functionalise(graph: fx.Graph, node: fx.Node) -> None:
    changed = node.args[0]
    if _is_shared(changed, node):
        origin = origin_of(node)
        raise RewriteError(
            f"{node.target} changes a tensor that something else sees", site=Site(origin.file, origin.line)
        )
    packet, overload = node.target._schema.name.split("::")[1].removesuffix("_"), node.target._overloadname
    twin = getattr(getattr(torch.ops.aten, packet), overload)
    later = _after(graph, node)
    node.target = twin
    changed.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)


def _after(graph: fx.Graph, node: fx.Node) -> set[fx.Node]:
    out, seen = set(), False
    for other in graph.nodes:
        if seen:
            out.add(other)
        seen = seen or other is node
    return out


_VIEWS = {"view", "transpose", "permute", "select", "slice", "unsqueeze", "squeeze", "expand", "t", "narrow", "split"}
_VIEWS |= {"chunk", "unbind", "detach", "alias", "getitem", "reshape", "unflatten", "flatten", "mT", "contiguous", "to"}


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    name = node.target._schema.name.split("::")[1] if hasattr(node.target, "_schema") else node.target.__name__
    return name in _VIEWS


def _is_shared(changed: fx.Node, by: fx.Node) -> bool:
    """True where the storage is an input's, or a view of it is alive after the change."""
    if changed.op == "placeholder" or _is_view(changed):
        return True
    return any(_is_view(user) and any(u is not by for u in user.users) for user in changed.users if user is not by)
