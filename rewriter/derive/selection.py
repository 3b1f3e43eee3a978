"""Reductions over the positions that have the extremum: arg-max, what is gathered there, how many there are.

    T(old → new) = the state where the extremum has not moved, the empty state where it has

for what has been selected before is then no longer the extremum. T composes, as the extremum moves one way only.
"""

from __future__ import annotations

from collections.abc import Callable

from rewriter.derive.chain import Definition
from rewriter.derive.factors import conjuncts, split_mask, without_cast
from rewriter.ir import TRUE, Apply, Node, Ref


def selected(predicate: Node, definition_of: Callable[[Ref], Definition]) -> tuple[Ref | None, list[Node]]:
    """(R, the other conditions) of a predicate with x == R, where R is the running extremum of x."""
    parts = conjuncts(predicate)
    for part in parts:
        others = [p for p in parts if p is not part]
        extremum = _extremum_of(part, others, definition_of)
        if extremum:
            return extremum, others
    return None, parts


def _extremum_of(part: Node, others: list[Node], definition_of: Callable[[Ref], Definition]) -> Ref | None:
    """R in x == R; in x >= R where R is a maximum, and x <= R where it is a minimum."""
    if not (isinstance(part, Apply) and part.op in ("eq", "le")):
        return None
    for k, end in enumerate(map(without_cast, part.args)):
        if not isinstance(end, Ref) or end.final:
            continue
        definition = definition_of(end)
        side = {"max": 0, "min": 1}.get(definition.op)
        if side is not None and part.op in ("eq", "le")[: 2 if k == side else 1]:
            return end if _bounds(definition, part.args[1 - k], others) else None
    return None


def _bounds(definition: Definition, value: Node, others: list[Node]) -> bool:
    """Whether the extremum is that of `value`, at least where `others` hold."""
    mask, kept = split_mask(value) if definition.op == "max" else (TRUE, value)
    held = {TRUE, *others, *conjuncts(mask)}
    return without_cast(kept) is without_cast(definition.body) and set(conjuncts(definition.predicate)) <= held
