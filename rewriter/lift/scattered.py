"""Products that are better written: what follows reads each at many positions."""

from __future__ import annotations

import re
from collections import Counter

from torch import fx

from rewriter.ir import Load, Program, walk
from rewriter.ir.printer import show
from rewriter.lift.values import Lifted

MOST_PLACES = 8  # at which a product is computed for one element of what follows


def scattered(program: Program, origins: dict[fx.Node, Lifted]) -> set[fx.Node]:
    """Origins, of those that a program inlines, whose operands it reads at more places than that: windows that are cut
    out of blocks of scores, each from several, hold a product for every way a position may come from. Elements of a
    short axis, written out one by one, are one place.
    """
    bodies = [o.body for o in program.outputs]
    places = Counter(name for name, _ in {(n.tensor.name, _place(n)) for n in walk(*bodies) if isinstance(n, Load)})
    operands = {o: {n.tensor.name for n in walk(v.body) if isinstance(n, Load)} for o, v in origins.items()}
    alike = Counter(name for names in operands.values() for name in names)
    many = {name for name, n in places.items() if n > MOST_PLACES * alike[name]}
    return {origin for origin, names in operands.items() if names & many}


def _place(load: Load) -> str:
    """The position without its numbers, and those of its axes."""
    return re.sub(r"\d+", "", show(load))
