"""Which part of a stream the loop of a sweep runs over."""

from __future__ import annotations

from rewriter.derive import Definition
from rewriter.ir import Axis, Node, Ref, walk
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


def _ends(interval: Interval) -> list[Node]:
    return [n for n in (interval.lower, interval.upper) if n is not None]


def _is_known(end: Node, known: frozenset[Axis]) -> bool:
    """Whether an end is known before the loop, and whole."""
    is_whole = not end.dtype.is_floating_point
    return is_whole and end.free <= known and not any(isinstance(n, Ref) for n in walk(end))
