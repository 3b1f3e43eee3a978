"""Which dimensions of the inputs may be 1 at a call where the kernel has a longer axis.

The drop-in expands such an input before anything else. That is right where expanding commutes with the whole program:
every value computed from the expanded input is the expanded value. So from each dimension that may be 1 the axes it
reaches are followed through the local lifts, op by op.

    s[b, h, m, n] + mask[b, 0, m, n]     the sum is as long as s, whatever the mask is
    mask[b, 0, m, n] == 0                still 1 where the mask is
    sum_b mask[b, 0, m, n]               lost: seven equal terms are not one
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from rewriter.ir import Axis, Index, Load, Node, Reduce, walk
from rewriter.lift.local import LocalLift
from rewriter.lift.values import Lifted
from rewriter.trace import Dimension, TracedModule
from rewriter.trace.calls import call_name
from rewriter.trace.sizes import shape_of

Carried = tuple[frozenset[Dimension], ...]  # per dimension of a value: it is 1 where all these input dimensions are
MIXED = {"linear": 1, "layer_norm": 1, "rms_norm": 1}  # ops that are not lifted: how many last dimensions they mix
RESHAPES = ("view", "reshape", "_unsafe_view", "unflatten", "flatten")
NONE: frozenset[Dimension] = frozenset()


class _Lost(Exception):
    """Expanding these input dimensions does not commute with an op."""

    def __init__(self, dims: frozenset[Dimension]):
        super().__init__()
        self.dims = dims


def broadcast_dimensions(traced: TracedModule, local: dict[fx.Node, LocalLift]) -> frozenset[Dimension]:
    """The largest part of the traced module's `loose` dimensions that is proved to broadcast."""
    dims = traced.loose
    while dims:
        try:
            _follow(traced, local, dims)
            return dims
        except _Lost as lost:
            first = min(lost.dims)[0]  # the others may then broadcast against this input
            dims -= {d for d in lost.dims if d[0] == first}
    return dims


def _follow(traced: TracedModule, local: dict[fx.Node, LocalLift], dims: frozenset[Dimension]) -> None:
    """Raises _Lost at the first op that does not commute, and where a result would be 1."""
    groups = [traced.dimensions_of(size) for size in traced.sizes]
    carried = _given(traced, dims)
    for node in traced.graph.nodes:
        held = {a: carried[a] for a in node.all_input_nodes if any(carried.get(a, ()))}
        if not held or not (node.op == "output" or _holds_values(node)):
            continue
        if node.op == "output":
            raise _Lost(_all(held))
        value = local[node].value if node in local else None
        if call_name(node) in MIXED:
            out = _rowwise(node, held)
        elif isinstance(value, Lifted):
            out = _through(value, {a.name: c for a, c in held.items()})
        elif not isinstance(value, tuple):  # each part of a tuple is lifted as its own value
            raise _Lost(_all(held))
        else:
            continue
        carried[node] = tuple(NONE if any(g <= c for g in groups if c) else c for c in out)


def _holds_values(node: fx.Node) -> bool:
    """A size read off a tensor is none: that the program makes the same calls was seen while tracing."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


def _given(traced: TracedModule, dims: frozenset[Dimension]) -> dict[fx.Node, Carried]:
    out: dict[fx.Node, Carried] = {}
    for k, name in enumerate(traced.inputs):
        if name:
            node = traced.placeholders[name]
            out[node] = tuple(frozenset({(k, d)} & dims) for d in range(node.meta["val"].dim()))
    return out


def _all(held: dict[fx.Node, Carried]) -> frozenset[Dimension]:
    return NONE.union(*(c for value in held.values() for c in value))


def _rowwise(node: fx.Node, held: dict[fx.Node, Carried]) -> Carried:
    """Of an op that is not lifted: what its first dimensions carry, where it leaves them alone."""
    first = held.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if first is None or len(held) > 1 or not torch.is_tensor(node.meta["val"]):
        raise _Lost(_all(held))
    kept = _kept(node)
    if any(first[kept:]):
        raise _Lost(_all(held))
    return (*first[:kept], *(NONE for _ in range(node.meta["val"].dim() - kept)))


def _kept(node: fx.Node) -> int:
    """How many first dimensions an op passes through."""
    old, new = shape_of(node.args[0].meta["val"]), shape_of(node.meta["val"])
    if call_name(node) in RESHAPES:
        return next((d for d, (a, b) in enumerate(zip(old, new)) if a is not b), min(len(old), len(new)))
    return len(old) - MIXED.get(call_name(node), len(old))


def _through(value: Lifted, held: dict[str, Carried]) -> Carried:
    """What each axis of a lifted value carries."""
    loads = [n for n in walk(value.body) if isinstance(n, Load)]
    for factor in _factors(value.body):
        dims = NONE.union(*held.get(factor.tensor.name, ()))
        if len({argument for argument, _ in dims}) == 1:
            raise _Lost(dims)
    for load in loads:
        for entry, dims in zip(load.index, held.get(load.tensor.name, ())):
            if dims and entry.free and not isinstance(entry, Index):
                raise _Lost(dims)
    for reduce in (n for n in walk(value.body) if isinstance(n, Reduce)):
        inner = [n for n in walk(reduce.predicate, reduce.body) if isinstance(n, Load)]
        for axis in reduce.axes:
            if dims := _along(axis, inner, held):
                raise _Lost(dims)
    bare = _bare(value.body)
    out = tuple(_along(axis, loads, held) for axis in value.axes)
    if dims := NONE.union(*(d for axis, d in zip(value.axes, out) if axis in bare)):
        raise _Lost(dims)
    return out


def _along(axis: Axis, loads: list[Load], held: dict[str, Carried]) -> frozenset[Dimension]:
    """The dimensions that all have to be 1 for an axis to be 1; none where a tensor of its own length moves along it."""
    found: list[frozenset[Dimension]] = []
    for load in loads:
        carried = held.get(load.tensor.name, (NONE,) * len(load.index))
        found += [dims for entry, dims in zip(load.index, carried) if axis in entry.free]
    return NONE.union(*found) if all(found) else NONE


def _factors(body: Node) -> Iterator[Load]:
    """Operands of contractions: sum_d q[m, d] * k[n, d]. What is one argument's alone there is no mask: it is left as
    it is.
    """
    for reduce in (n for n in walk(body) if isinstance(n, Reduce) and n.op == "sum"):
        todo = [reduce.body]
        while todo:
            node = todo.pop()
            if isinstance(node, Load):
                yield node
            elif getattr(node, "op", "") in ("mul", "cast"):
                todo += node.children


def _bare(body: Node) -> frozenset[Axis]:
    """Axes whose position is used other than to read a tensor."""
    out: set[Axis] = set()
    seen: dict[Node, None] = {}
    todo = [body]
    while todo:
        node = todo.pop()
        if node in seen or isinstance(node, Load):
            continue
        seen[node] = None
        out |= {node.axis} if isinstance(node, Index) else set()
        todo += node.children
    return frozenset(out)
