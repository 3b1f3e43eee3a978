"""What is left to PyTorch though someone may have hoped for a kernel: lone rows, and ops that index notation does not
have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import fx

from rewriter.errors import Reason
from rewriter.lift import Region, lift_locally
from rewriter.lift.region import site_of
from rewriter.trace import TracedModule
from rewriter.trace.calls import call_name

if TYPE_CHECKING:
    from rewriter.hosts import RewrittenModel
    from rewriter.pipeline import Rewritten

ROWS = {"softmax", "log_softmax", "layer_norm", "rms_norm", "group_norm", "instance_norm"}
SUMS = {"sum", "mean", "amax", "max", "amin", "min", "var", "std", "norm", "linalg_vector_norm", "logsumexp"}


def left_alone(rewritten: RewrittenModel, *, rows: bool) -> tuple[Reason, ...]:
    """Everything that stays as it was, with the reason.

    rows: whether lone rows were asked for.
    """
    said = list(rewritten.unfused)
    for seen in rewritten.seen:
        why = _whys(seen) if rows else None
        said += _lone_rows(seen.traced, [f.region for f in seen.fused], said, why)
    if not (rewritten.hosts or said):
        said += [reason for seen in rewritten.seen for reason in _not_lifted(seen.traced)]
    return tuple(said)


def _lone_rows(
    traced: TracedModule, regions: Iterable[Region], said: Iterable[Reason], why: Mapping[fx.Node, str] | None
) -> list[Reason]:
    """A reason per line for every softmax or norm, by call or by hand, that is part of no chain.

    said: what is left alone for other reasons; its lines are not named again.
    why: where rows were asked for, what kept a node from being rewritten.
    """
    taken = frozenset().union(*({*r.inside, *r.outputs} for r in regions))
    known = {r.site for r in said}
    out: dict = {}
    for node in traced.graph.nodes:
        if not _is_taken(node, taken) and site_of(node) not in known and _is_row(node):
            out.setdefault(site_of(node), Reason(_text(node, why), site_of(node)))
    return list(out.values())


def _is_taken(node: fx.Node, taken: frozenset[fx.Node]) -> bool:
    """Of `max(dim=-1)` a chain takes the values."""
    return node in taken or any(call_name(u) == "getitem" and u in taken for u in node.users)


def _whys(rewritten: Rewritten) -> dict[fx.Node, str]:
    """What kept nodes from being rewritten as rows: they are not expressed, or a kernel would not help."""
    lifted = lift_locally(rewritten.traced.graph)
    return {n: x.reason for n, x in lifted.items() if x.value is None} | dict(rewritten.refused_rows)


def _text(node: fx.Node, why: Mapping[fx.Node, str] | None) -> str:
    row = f"a lone row of {call_name(node)} is left to PyTorch's kernel"
    if why is None:
        return f"{row}; --rows asks for it"
    return f"{row} in spite of --rows: {why.get(node, 'it is no row of one tensor')}"


def _is_row(node: fx.Node) -> bool:
    if node.op != "call_function" or call_name(node) not in ROWS | SUMS:
        return False
    if node.args[0].meta["val"].dtype is torch.float64:
        return False
    return call_name(node) in ROWS or _is_spread(node)


def _is_spread(node: fx.Node) -> bool:
    """Whether a reduction's result meets what it was taken over: `e / e.sum(-1, keepdim=True)`."""
    row, own = node.args[0].meta["val"].shape, _lineage(node.args[0])
    todo, seen = list(node.users), {node}
    while todo:
        user = todo.pop()
        value = user.meta.get("val")
        if user in seen or user.op != "call_function" or not _keeps_positions(user):
            continue
        seen.add(user)
        others = [n for n in user.all_input_nodes if n not in seen]
        if torch.is_tensor(value) and value.shape == row and any(_lineage(n) & own for n in others):
            return True
        todo += user.users
    return False


def _lineage(node: fx.Node) -> set[fx.Node]:
    """A value and what it is computed from position by position."""
    found, todo = set(), [node]
    while todo:
        value = todo.pop()
        if value not in found and torch.is_tensor(value.meta.get("val")):
            found.add(value)
            todo += value.all_input_nodes if value.op == "call_function" and _keeps_positions(value) else ()
    return found


def _keeps_positions(node: fx.Node) -> bool:
    """Pointwise calls and views; in a product or a reduction positions are lost."""
    tags = getattr(node.target, "tags", ())
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    is_view = any(r.alias_info for r in returns)
    return torch.Tag.pointwise in tags or is_view or call_name(node) == "getitem"


def _not_lifted(traced: TracedModule) -> list[Reason]:
    """Why calls are not expressed in index notation, once a line: for a program of which nothing was fused."""
    out: dict = {}
    for node, lifted in lift_locally(traced.graph).items():
        if lifted.value is None:
            cause = lifted.reason.split(": ", 1)[-1]
            out.setdefault((site_of(node), cause), Reason(f"left as it was: {cause}", site_of(node)))
    return list(out.values())
