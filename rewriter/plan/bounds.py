"""Which part of a stream the loop of a sweep runs over."""

from __future__ import annotations

from dataclasses import replace

from rewriter.derive import Definition
from rewriter.ir import Axis, Node, Ref, walk
from rewriter.plan.kernel import KernelPlan, Sweep
from rewriter.sparsity import EVERYWHERE, Interval, Support, support_of, union


def sweep_support(
    definitions: tuple[Definition, ...], stream: Axis, rows: tuple[Axis, ...], grid: tuple[Axis, ...]
) -> Support | None:
    """What all reductions of a sweep leave of its stream; None where that is no less than all of it.

    The ends depend on rows and grid alone. Where rows are two, streams go one position at a time, all of them.
    """
    if len(rows) > 1:
        return None
    known = frozenset((*rows, *grid))
    found = union([support_of(d.predicate, stream) for d in definitions])
    inner = found.inner if found.inner and all(_is_known(n, known) for n in _ends(found.inner)) else None
    lower, upper = (
        n if n is not None and _is_known(n, known) else None for n in (found.outer.lower, found.outer.upper)
    )
    outer = Interval(lower, upper)
    if outer == EVERYWHERE.outer and (inner is None or inner == EVERYWHERE.inner):
        return None
    return Support(outer, inner)


def by_bounds(plan: KernelPlan) -> KernelPlan:
    """The kernel with loop bounds alone: no maps, and fills among what is reduced. So a program may have any part of a
    stream: what a map lists, and whether fills are needed, is told of all of it.
    """

    def bounded(sweep: Sweep) -> Sweep:
        if sweep.map is None and sweep.fill is None:
            return sweep
        support = sweep_support(sweep.definitions, sweep.stream, plan.rows, plan.grid)
        return replace(sweep, support=support, map=None, mapped="", fill=None)

    return replace(plan, sweeps=tuple(map(bounded, plan.sweeps)))


def _ends(interval: Interval) -> list[Node]:
    return [n for n in (interval.lower, interval.upper) if n is not None]


def _is_known(end: Node, known: frozenset[Axis]) -> bool:
    """Whether an end is known before the loop, and whole."""
    is_whole = not end.dtype.is_floating_point
    return is_whole and end.free <= known and not any(isinstance(n, Ref) for n in walk(end))
