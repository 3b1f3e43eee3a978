"""Whether what is left out beside fills is needed after all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewriter.emit.expr import constant
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
