"""Block maps: where loop bounds do not tell which tiles of a stream a mask leaves, a kernel of its own looks first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from rewriter.derive import Definition
from rewriter.ir import FALSE, TRUE, Axis, Const, Node, Reduce, Ref, apply, walk
from rewriter.ir.integer import from_poly, plus, to_poly
from rewriter.sparsity import Support, Truth, truth_of

NARROW = 512  # stream positions: so few that what is skipped of them does not pay for looking


@dataclass(frozen=True)
class BlockMap:
    """For every tile of rows the tiles of a stream in which something is left by one of a sweep's predicates, those in
    which all of them hold throughout apart from the others.

    some, every: where one of the predicates holds, and where all do. `row` is None where they read none; `grid` are the
    grid axes that they read: along the others a map is shared. `ranges`: how tiles are told without going through
    their positions, if they can be. `lists_rest`: tiles of which nothing is left are listed too.
    """

    row: Axis | None
    stream: Axis
    grid: tuple[Axis, ...]
    some: Node
    every: Node
    ranges: Truth | None = None
    lists_rest: bool = False

    @property
    def lists(self) -> int:
        """How many there are for each tile of rows."""
        return 3 if self.lists_rest else 2


def block_map(
    definitions: tuple[Definition, ...],
    stream: Axis,
    rows: tuple[Axis, ...],
    grid: tuple[Axis, ...],
    support: Support | None,
    multiplies: bool,
) -> tuple[BlockMap | None, str]:
    """(the map, why) or (None, why not); (None, "") where there is no question: loop bounds tell all.

    multiplies: whether tiles are multiplied as matrices: other work is no more than that of looking at a mask.
    """
    predicates = tuple(dict.fromkeys(d.predicate for d in definitions))
    if not predicates or TRUE in predicates or (support and support.inner == support.outer):
        return None, ""
    some = reduce(lambda a, b: apply("or", a, b), predicates)
    every = reduce(lambda a, b: apply("and", a, b), predicates)
    if stream not in some.free or some is FALSE:
        return None, ""
    why_not = _why_not(some, stream, rows, grid, multiplies) or _is_little(stream, support)
    if why_not:
        return None, f"no map of tiles: {why_not}"
    read = tuple(a for a in grid if a in some.free)
    ranges = _ranges(some, every, rows[0], stream)
    if ranges is None and all(a in read or a.extent is Const(1) for a in grid):
        return None, "no map of tiles: no two programs would share it, and masks are read once as it is"
    row = rows[0] if rows[0] in some.free else None
    return BlockMap(row, stream, read, some, every, ranges), "ranges" if ranges else "positions"


def _ranges(some: Node, every: Node, row: Axis, stream: Axis) -> Truth | None:
    parts = [truth_of(p, row, stream) for p in (some, every)]
    return Truth(parts[0].some, parts[1].every) if all(parts) else None


def _why_not(some: Node, stream: Axis, rows: tuple[Axis, ...], grid: tuple[Axis, ...], multiplies: bool) -> str:
    if len(rows) != 1:
        return "no tile of rows along one axis"
    if not multiplies:
        return "no matrix product would be left out"
    if not some.free <= {*rows, *grid, stream}:
        return "the mask is computed from features"
    if any(isinstance(n, (Ref, Reduce)) for n in walk(some)):
        return "the mask is computed from reductions"
    return ""


def _is_little(stream: Axis, support: Support | None) -> str:
    if isinstance(stream.extent, Const) and stream.extent.value <= NARROW:
        return f"a stream of {stream.extent.value}"
    outer = support and support.outer
    if outer and outer.lower is not None and outer.upper is not None:
        width = from_poly(plus(to_poly(outer.upper), to_poly(outer.lower), -1))
        if isinstance(width, Const) and width.value <= NARROW:
            return f"a band of {width.value} positions"
    return ""
