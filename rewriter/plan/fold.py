"""Axes along which what is streamed is shared, as rows of a tile: it is read once for all of them.

grid h, rows m; k[h // G, n, d]   →   grid h // G, rows r = m * G + h % G
grid h, rows m; k[n, d]           →   rows r = m * H + h
grid h;         k[h // G, n, d]   →   axes h // G and h % G, of which the second may be rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from rewriter.derive import Chain
from rewriter.derive.factors import depends_on
from rewriter.ir import (
    Apply,
    Axis,
    Const,
    Load,
    Node,
    Output,
    Ref,
    apply,
    fresh_axis,
    index,
    substitute,
    transform,
    walk,
)
from rewriter.ir.integer import to_poly
from rewriter.plan.bounds import sweep_support
from rewriter.plan.kernel import Dot, KernelPlan, Loop, Sweep
from rewriter.plan.parts import moved_definition


@dataclass(frozen=True)
class _Shared:
    """An axis in groups of `size` positions that read the same; `groups` is how many, None where one."""

    axis: Axis
    size: Node
    groups: Node | None


@dataclass(frozen=True)
class Move:
    """Axes replaced by others: `new` in their place, by the positions `by`; `which` is the position of a group."""

    new: dict[Axis, tuple[Axis, ...]]
    by: dict[Axis, Node]
    which: dict[Node, Node]

    def axes(self, axes: Iterable[Axis]) -> tuple[Axis, ...]:
        return tuple(dict.fromkeys(n for a in axes for n in self.new.get(a, (a,))))

    def node(self, node: Node) -> Node:
        return substitute(transform(node, self._rule), self.by)

    def _rule(self, node: Node) -> Node:
        if isinstance(node, Ref):
            own = {index(a): tuple(map(index, axes)) for a, axes in self.new.items()}
            return replace(node, index=tuple(n for i in node.index for n in own.get(i, (i,))))
        return self.which.get(node, node)

    def output(self, output: Output) -> Output:
        return replace(output, body=self.node(output.body), at=tuple(map(self.node, output.position)))

    def chain(self, chain: Chain) -> Chain:
        definitions = (replace(moved_definition(d, self.node), axes=self.axes(d.axes)) for d in chain.definitions)
        outputs = tuple(map(self.output, chain.outputs))
        return replace(chain, axes=self.axes(chain.axes), definitions=tuple(definitions), outputs=outputs)


def grouped(chain: Chain) -> tuple[Chain, dict[Node, Node]] | None:
    """The chain with an axis in two that is streamed in groups, and its nodes as they were; None without one."""
    streams = {d.stream for d in chain.definitions}
    for axis in (a for a in chain.axes if a not in streams):
        shared = _shared_along(axis, _streamed(chain, streams))
        if shared and shared.groups:
            inner = fresh_axis(shared.size, "i")
            move = _move(shared, inner, index(inner))
            return move.chain(chain), {move.node(n): n for n in walk(*chain.roots)}
    return None


def folded(plan: KernelPlan) -> KernelPlan:
    """The kernel with all grid axes in its rows along which it streams the same; itself where there are none."""
    while found := next(filter(None, (_shared(plan, a) for a in reversed(plan.grid))), None):
        plan = _fold(plan, found)
    return plan


def _shared(plan: KernelPlan, axis: Axis) -> _Shared | None:
    if len(plan.rows) != 1 or not plan.dots or axis.extent is Const(1):
        return None
    row, chain = plan.rows[0], plan.chain
    axes = [*(d.axes for d in chain.definitions), *(o.over for o in chain.outputs)]
    if any((axis in over) != (row in over) for over in axes) or any(d.rows is not row or d.skew for d in plan.dots):
        return None
    return _shared_along(axis, [n for n in _streamed(chain, plan.streams) if not depends_on(n, row)])


def _streamed(chain: Chain, streams: Iterable[Axis]) -> list[Load]:
    return [n for n in walk(*chain.roots) if isinstance(n, Load) and any(depends_on(n, s) for s in streams)]


def _shared_along(axis: Axis, loads: list[Load]) -> _Shared | None:
    """How tensors are the same along an axis: all of it, or groups of as many positions for each of them."""
    entries = [(e, extent) for n in loads for e, extent in zip(n.index, n.tensor.shape) if axis in e.free]
    if not entries:
        return _Shared(axis, axis.extent, None) if loads else None
    first, _ = entries[0]
    is_group = isinstance(first, Apply) and first.op == "floordiv" and first.args[0] is index(axis)
    if not is_group or first.args[1].free or any(e is not first for e, _ in entries):
        return None
    size = first.args[1]
    whole = [extent for _, extent in entries if _are_all(axis, size, extent)]
    return _Shared(axis, size, whole[0]) if whole else None


def _are_all(axis: Axis, size: Node, groups: Node) -> bool:
    """Whether so many whole groups are all of an axis: a tensor may have more than are read, and the last fewer members.
    Of h // (H // g) all are below g only where g divides H.
    """
    made = to_poly(apply("mul", groups, size))
    return made == to_poly(axis.extent) or size is apply("floordiv", axis.extent, groups)


def _move(shared: _Shared, inner: Axis, at: Node) -> Move:
    """The shared axis as its groups, and `at` in each of them, which is along `inner`."""
    old, size = shared.axis, shared.size
    if shared.groups is None:
        return Move({old: (inner,)}, {old: at}, {})
    group = fresh_axis(shared.groups, "g")
    which = Apply("floordiv", (index(old), size), torch.int64)
    position = apply("add", apply("mul", index(group), size), at)
    return Move({old: (group, inner)}, {old: position}, {which: index(group)})


def _fold(plan: KernelPlan, shared: _Shared) -> KernelPlan:
    row = plan.rows[0]
    rows = fresh_axis(apply("mul", row.extent, shared.size), "r")
    move = _move(shared, rows, apply("mod", index(rows), shared.size))
    by = {**move.by, row: apply("floordiv", index(rows), shared.size)}
    new = {shared.axis: tuple(a for a in move.new[shared.axis] if a is not rows), row: (rows,)}
    return _moved(plan, Move(new, by, move.which), rows)


def _moved(plan: KernelPlan, move: Move, rows: Axis) -> KernelPlan:
    """The same kernel over other axes."""
    chain, grid = move.chain(plan.chain), move.axes(plan.grid)

    def of_sweep(sweep: Sweep) -> Sweep:
        own = tuple(chain.definition(d.name) for d in sweep.definitions)
        support = sweep_support(own, sweep.stream, (rows,), grid)
        return replace(sweep, definitions=own, outputs=tuple(map(move.output, sweep.outputs)), support=support)

    inside = [n for d in plan.dots for n in (d.left, d.right)] + [n for r in plan.loops for n in (r.predicate, r.body)]
    return replace(
        plan,
        chain=chain,
        grid=grid,
        rows=(rows,),
        sweeps=tuple(map(of_sweep, plan.sweeps)),
        outputs=tuple(map(move.output, plan.outputs)),
        dots=tuple(_moved_dot(d, move.node, rows) for d in plan.dots),
        loops=tuple(_moved_loop(r, move.node) for r in plan.loops),
        was={move.node(n): plan.was.get(n, n) for n in walk(*plan.chain.roots, *inside)},
    )


def _moved_dot(dot: Dot, moved: Callable[[Node], Node], rows: Axis) -> Dot:
    scale = tuple(map(moved, dot.scale))
    return replace(dot, node=moved(dot.node), left=moved(dot.left), right=moved(dot.right), scale=scale, rows=rows)


def _moved_loop(loop: Loop, moved: Callable[[Node], Node]) -> Loop:
    return replace(loop, node=moved(loop.node), predicate=moved(loop.predicate), body=moved(loop.body))
