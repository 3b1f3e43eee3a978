"""Fills: large negative numbers that a program puts in the place of what it masks.

    p = exp(where(keep, s, -1e9) - m)    is 0 where not kept, if m > -1e9 + UNDERFLOW

So tiles in which nothing is kept may wait until the maxima of their rows are known, and are left out unless one of
those is no larger: in rows in which nothing is kept at all, every fill weighs.

What the lowest number of a dtype is added to is such a fill, too: scores are smaller than its last digit.

    s + where(keep, bias, -3.4e38)    is where(keep, s + bias, -3.4e38)
    s + mask                          is where(mask != -3.4e38, s + mask, -3.4e38)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rewriter.derive import Definition
from rewriter.derive.factors import as_terms, without_cast
from rewriter.ir import Apply, Axis, Const, Load, Node, Reduce, Tensor, Where, apply, cast, const, transform, walk
from rewriter.plan.parts import moved_definition

SMALL = -1e3  # fills that rows of scores are expected to exceed by far
ABSORBS = -1e30  # of such a number and less, scores below 1e22 change no digit, in fp32 or bf16


@dataclass(frozen=True)
class Fill:
    """What a loop may leave out: where the `predicate` does not hold, exponents are numbers.

    kept, filled: the definitions of a sweep where the predicate holds throughout a tile, and where it holds nowhere:
    numbers, unless a tensor is added to them that may mask, too.
    `floors`: of each maximum, by its name, the number that it must exceed.
    """

    predicate: Node
    floors: tuple[tuple[str, Const], ...]
    kept: tuple[Definition, ...]
    filled: tuple[Definition, ...]

    def masked(self, definitions: tuple[Definition, ...]) -> tuple[Definition, ...]:
        """As if what is filled were masked, for bounds and maps."""
        return tuple(replace(d, predicate=apply("and", d.predicate, self.predicate)) for d in definitions)


def fill_of(definitions: tuple[Definition, ...], stream: Axis) -> Fill | None:
    """The fill that all reductions of a sweep have, where all of them are maxima of exponents or sums of their
    exponentials.
    """
    exponents = tuple(dict.fromkeys(d.shift.exponent for d in definitions if d.shift))
    for predicate in dict.fromkeys(_split(site)[0] for site in _sites(exponents[0])) if exponents else ():
        splits = {site: _split(site) for exponent in exponents for site in _sites(exponent)}
        splits = {site: split for site, split in splits.items() if split[0] is predicate}
        filled = _replaced(definitions, {site: number for site, (_, _, number) in splits.items()})
        floors = _floors(filled, stream)
        if stream in predicate.free and floors and all(f.value <= SMALL for f in floors.values()):
            kept = _replaced(definitions, {site: value for site, (_, value, _) in splits.items()})
            is_known = not any(isinstance(site, Apply) and _has_tensors(site) for site in splits)
            return Fill(predicate, tuple(floors.items()), kept, filled if is_known else definitions)
    return None


def _sites(node: Node) -> Iterator[Node]:
    """Choices between a value and a number, outside reductions, outermost first: of a sum the whole."""
    if isinstance(node, (Where, Apply)) and _split(node):
        yield node
        if isinstance(node, Apply):
            return
    for child in node.children if not isinstance(node, Reduce) else ():
        yield from _sites(child)


def _split(site: Node) -> tuple[Node, Node, Const] | None:
    """where(p, where(q, s, f), f)  →  p & q, s, f"""
    match site:
        case Apply(op="add" | "sub"):
            return _absorbed(site)
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


def _absorbed(whole: Apply) -> tuple[Node, Node, Const] | None:
    """s + where(p, t, f)  →  p, s + t, f where f absorbs s. Of two such terms the sum overflows."""
    terms = as_terms(whole)
    found = [(term, low) for term in terms if (low := _low(without_cast(term.node)))]
    if len(found) != 1 or found[0][0].sign < 0:
        return None
    term, (predicate, kept, number) = found[0]
    if any(_may_be_low(n) for n in walk(*(t.node for t in terms if t is not term))):
        return None
    return predicate, _with(whole, term.node, kept), number


def _has_tensors(whole: Apply) -> bool:
    """Whether anything beside the fill is read from memory as it is: at a call it may be as low as the fill, or -inf."""
    others = [t.node for t in as_terms(whole) if not _low(without_cast(t.node))]
    return any(map(_reads, others))


def _reads(node: Node) -> bool:
    return isinstance(node, Load) or not isinstance(node, Reduce) and any(map(_reads, node.children))


def _low(term: Node) -> tuple[Node, Node, Const] | None:
    """where(p, t, f)  →  p, t, f where f absorbs scores;  mask  →  mask != f, mask, f where it held such an f"""
    match term:
        case Load(tensor=Tensor(masks=float() as low)) if _absorbs(low):
            number = const(low, term.dtype)
            return apply("ne", term, number), term, number
        case Where(predicate=p, then=kept, other=Const(value=low) as number) if _absorbs(low):
            return p, kept, number
        case Where(predicate=p, then=Const(value=low) as number, other=kept) if _absorbs(low):
            return apply("not", p), kept, number
    return None


def _absorbs(number: float) -> bool:
    return ABSORBS >= number > -math.inf


def _may_be_low(node: Node) -> bool:
    if isinstance(node, Load):
        return node.tensor.masks is not None
    return isinstance(node, Const) and node.dtype.is_floating_point and node.value <= ABSORBS


def _with(whole: Node, term: Node, value: Node) -> Node:
    """The sum with another value in the place of a term: without the term where that is 0."""

    def moved(node: Node) -> Node:
        match node:
            case Apply(op="add", args=(x, Const(value=0)) | (Const(value=0), x)):
                return cast(x, node.dtype)
        return cast(value, node.dtype) if node is term else node

    return transform(whole, moved)


def _replaced(definitions: tuple[Definition, ...], by: dict[Node, Node]) -> tuple[Definition, ...]:
    def moved(node: Node) -> Node:
        return transform(node, lambda n: cast(by[n], n.dtype) if n in by else n)

    return tuple(moved_definition(d, moved) for d in definitions)


def _floors(filled: tuple[Definition, ...], stream: Axis) -> dict[str, Const]:
    """The number that all exponents of a shift are, by the maximum they are shifted by; none where one is no number, or
    another than what the maximum is taken of.
    """
    found: dict[str, Const] = {}
    shifted = [d for d in filled if d.shift]
    states = {d.shift.state.name for d in shifted}
    for definition in filled:
        name = definition.shift.state.name if definition.shift else definition.name
        floor = definition.body if definition.name in states and definition.op == "max" else _exponent(definition)
        if not isinstance(floor, Const) or found.setdefault(name, floor) is not floor:
            return {}
    return {} if any(stream in d.shift.phi.free for d in shifted) else found


def _exponent(definition: Definition) -> Node | None:
    """That of a sum of exponentials, each times what does not depend on how large it is."""
    shift = definition.shift
    is_plain = definition.op == "sum" and shift and not (shift.mass or definition.centre or definition.extremum)
    return shift.exponent if is_plain else None
