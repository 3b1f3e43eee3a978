"""What is left of fills in whole tiles, and whether what is left out beside them is needed after all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewriter.derive import Definition
from rewriter.derive.factors import conjuncts
from rewriter.emit.expr import constant
from rewriter.ir import Node, Where, apply
from rewriter.plan import Fill

if TYPE_CHECKING:
    from rewriter.emit.values import Values


def written_low(values: Values, fill: Fill) -> str:
    """1 where a row of the tile has nothing that exceeds the fill by so much that fills weigh 0, else 0."""
    parts = []
    for name, floor in fill.floors:
        rows = values.tile(values.plan.chain.definition(name).axes)
        inside = values.bounds(frozenset(rows), rows, values.prologue)
        is_low = f"({values.names.state[name]} <= {constant(floor)} + UNDERFLOW)"
        code = " & ".join(filter(None, [inside, is_low]))
        parts.append(f"tl.max(({code}).to(tl.int32))" if rows else f"tl.cast({code}, tl.int32)")
    return " | ".join(parts)


def left_of(values: Node, definition: Definition) -> Node:
    """What a choice takes in tiles in which all of the predicate holds."""
    if not isinstance(values, Where):
        return values
    held = set(conjuncts(definition.predicate))
    if held.issuperset(conjuncts(values.predicate)):
        return values.then
    return values.other if apply("not", values.predicate) in held else values
