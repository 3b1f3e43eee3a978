"""Which loops inside a tile are written out turn by turn: their loads do not wait for each other, and what does not
depend on the stream is moved out of the loop around by Triton's own passes, as it is of no loop inside a loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from rewriter.ir import Const, Node, Param, Reduce, walk
from rewriter.plan.kernel import KernelPlan, Loop

TURNS = 16  # of one loop
TURNS_OF_ALL = 32  # of a loop and those in it, multiplied


def unrolled(plan: KernelPlan, example: Mapping[Param, int]) -> KernelPlan:
    """Its short loops unrolled: of an extent that only the call knows, those that are short in the example.

    What else is as long is no size that a kernel is compiled anew for.
    """
    others = {a.extent for a in (*plan.grid, *plan.rows, *plan.streams)}
    loops = (replace(r, unrolled=_is_short(r, example) and r.axis.extent not in others) for r in plan.loops)
    return replace(plan, loops=tuple(loops))


def _is_short(loop: Loop, example: Mapping[Param, int]) -> bool:
    turns = _extent(loop.axis.extent, example)
    return not loop.whole and turns <= TURNS and turns * _turns(loop.body, example) <= TURNS_OF_ALL


def _turns(node: Node, example: Mapping[Param, int]) -> float:
    """How often what is inside the reductions of a value is computed."""
    turns: dict[Node, float] = {}
    for n in walk(node):
        turns[n] = max((turns[c] for c in n.children), default=1)
        for axis in n.axes if isinstance(n, Reduce) else ():
            turns[n] *= _extent(axis.extent, example)
    return turns[node]


def _extent(extent: Node, example: Mapping[Param, int]) -> float:
    """As a number; inf where the example does not tell."""
    return extent.value if isinstance(extent, Const) else example.get(extent, math.inf)
