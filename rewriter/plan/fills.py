"""Fills: large negative numbers that a program puts in the place of what it masks.

    p = exp(where(keep, s, -1e9) - m)    is 0 where not kept, if m > -1e9 + UNDERFLOW

So tiles in which nothing is kept may wait until the maxima of their rows are known, and are left out unless one of
those is no larger: in rows in which nothing is kept at all, every fill weighs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rewriter.derive import Definition
from rewriter.ir import Axis, Const, Node, Reduce, Where, apply, cast, transform
from rewriter.plan.parts import moved_definition

SMALL = -1e3  # fills that rows of scores are expected to exceed by far


@dataclass(frozen=True)
class Fill:
    """What a loop may leave out: where the `predicate` does not hold, exponents are the `floor`.

    kept, filled: the definitions of a sweep where the predicate holds throughout a tile, and where it holds nowhere.
    `states` are the maxima that must exceed the floor.
    """

    predicate: Node
    floor: Const
    kept: tuple[Definition, ...]
    filled: tuple[Definition, ...]
    states: tuple[str, ...]

    def masked(self, definitions: tuple[Definition, ...]) -> tuple[Definition, ...]:
        """As if what is filled were masked, for bounds and maps."""
        return tuple(replace(d, predicate=apply("and", d.predicate, self.predicate)) for d in definitions)


def fill_of(definitions: tuple[Definition, ...], stream: Axis) -> Fill | None:
    """The fill that all reductions of a sweep have, where all of them are maxima of exponents or sums of their
    exponentials.
    """
    exponents = [d.shift.exponent for d in definitions if d.shift]
    for site in _sites(exponents[0]) if exponents else ():
        predicate, kept, number = _split(site)
        filled = _replaced(definitions, site, number)
        floor = _floor(filled, stream)
        if stream in predicate.free and floor is not None and floor.value <= SMALL:
            states = dict.fromkeys(d.shift.state.name for d in definitions if d.shift)
            return Fill(predicate, floor, _replaced(definitions, site, kept), filled, tuple(states))
    return None


def _sites(node: Node) -> Iterator[Node]:
    """Choices between a value and a number, outside reductions, outermost first."""
    if isinstance(node, Where) and _split(node):
        yield node
    for child in node.children if not isinstance(node, Reduce) else ():
        yield from _sites(child)


def _split(site: Node) -> tuple[Node, Node, Const] | None:
    """where(p, where(q, s, f), f)  →  p & q, s, f"""
    match site:
        case Where(predicate=p, then=kept, other=Const() as number):
            pass
        case Where(predicate=p, then=Const() as number, other=kept):
            p = apply("not", p)
        case _:
            return None
    if not number.dtype.is_floating_point or not math.isfinite(number.value) or isinstance(kept, Const):
        return None
    inner = _split(kept)
    return (apply("and", p, inner[0]), *inner[1:]) if inner and inner[2] is number else (p, kept, number)


def _replaced(definitions: tuple[Definition, ...], site: Node, by: Node) -> tuple[Definition, ...]:
    by = cast(by, site.dtype)

    def moved(node: Node) -> Node:
        return transform(node, lambda n: by if n is site else n)

    return tuple(moved_definition(d, moved) for d in definitions)


def _floor(filled: tuple[Definition, ...], stream: Axis) -> Const | None:
    """What all exponents are, and all that their maxima are taken of, if one number."""
    states = {d.shift.state.name for d in filled if d.shift}
    found = {d.body if d.name in states and d.op == "max" else _exponent(d) for d in filled}
    (floor,) = found if len(found) == 1 else (None,)
    is_fixed = not any(stream in d.shift.phi.free for d in filled if d.shift)
    return floor if isinstance(floor, Const) and is_fixed else None


def _exponent(definition: Definition) -> Node | None:
    """That of a sum of exponentials, each times what does not depend on how large it is."""
    shift = definition.shift
    is_plain = definition.op == "sum" and shift and not (shift.mass or definition.centre or definition.extremum)
    return shift.exponent if is_plain else None
