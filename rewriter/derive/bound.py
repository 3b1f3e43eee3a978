"""A static bound on an exponent in place of its running maximum.

    m = max_n x[n];  l = sum_n exp(x[n] - m);  acc = sum_n exp(x[n] - m) * v[n];  acc / l,  where -30 <= x <= 30
    →   l = sum_n exp(x[n]);  acc = sum_n exp(x[n]) * v[n];  acc / l

What is shifted by m is multiplied by exp(m - c), c the middle of the bound. Results in which that factor cancels stay.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from rewriter.derive.chain import Chain, Definition
from rewriter.derive.ranges import range_of
from rewriter.ir import Apply, Const, Node, Ref, Where, apply, const, walk

HALF_RANGE = {torch.float16: 9.0}  # of exponents: what exp gives of them is neither 0 nor inf, in the type of operands
HALF_RANGE_OTHERWISE = 60.0  # a sum of 10⁹ such weights, of values up to 1000, stays below 3.4e38
ORDER = ("eq", "ne", "lt", "le", "gt", "ge")


def bounded(chain: Chain) -> Chain:
    """The chain without the running maxima that a bound makes needless; the same chain where there are none."""
    for maximum in chain.definitions:
        if maximum.op == "max" and maximum.shift is None and _is_needless(maximum, chain):
            chain = _without(maximum, chain)
    return chain


def _is_needless(maximum: Definition, chain: Chain) -> bool:
    group = _shifted_by(maximum, chain)
    names = {d.name for d in group}
    others = [d for d in chain.definitions if d.name not in names]
    read = {n.name for d in others for n in walk(*d.roots) if isinstance(n, Ref)}
    return (
        bool(group)
        and all(_is_plain(d, maximum) for d in group)
        and _is_bounded({middle_of(d.shift.exponent, chain) for d in group})
        and (_narrowest(chain) == HALF_RANGE_OTHERWISE or not any(_weighs_more(d) for d in group))
        and not read & {*names, maximum.name}
        and not any(isinstance(n, Ref) and n.name == maximum.name for o in chain.outputs for n in walk(o.body))
        and all(_degree(o.body, names) in (0, None) for o in chain.outputs)
    )


def _shifted_by(maximum: Definition, chain: Chain) -> list[Definition]:
    return [d for d in chain.definitions if d.shift and d.shift.state.name == maximum.name]


def _is_plain(definition: Definition, maximum: Definition) -> bool:
    """A sum of exponentials less the maximum itself, or less 0 where that is -inf."""
    shift = definition.shift
    is_maximum = shift.settled or (isinstance(shift.phi, Ref) and shift.phi.name == maximum.name)
    return definition.op == "sum" and is_maximum and shift.mass is None and not definition.centre


def _is_bounded(middles: set[float | None]) -> bool:
    """Whether all exponents of a group move by the same number."""
    return len(middles) == 1 and None not in middles


def middle_of(exponent: Node, chain: Chain) -> float | None:
    """The middle of an exponent's bound; None where it has none, or too wide a one."""
    low, high = range_of(exponent)
    return (low + high) / 2 if high - low <= 2 * _narrowest(chain) else None


def _narrowest(chain: Chain) -> float:
    return min(HALF_RANGE.get(t.dtype, HALF_RANGE_OTHERWISE) for t in chain.tensors)


def _weighs_more(definition: Definition) -> bool:
    """Whether weights, a matrix product's operand, have factors beside the exponential, which may be of any size."""
    own = [f for f in definition.rest if f.free <= definition.shift.exponent.free]
    return not all(_is_near_one(f) for f in own)


def _is_near_one(factor: Node) -> bool:
    """Whether a factor is 0 or about 1, as where weights are kept or dropped."""
    match factor:
        case Const(value=value):
            return value == 0 or 0.25 <= abs(value) <= 4
        case Where(then=a, other=b):
            return _is_near_one(a) and _is_near_one(b)
        case Apply(op="cast", args=(x,)):
            return x.dtype is torch.bool or _is_near_one(x)
        case Apply(op="mul" | "div", args=(a, b)):
            return _is_near_one(a) and _is_near_one(b)
    return False


def _without(maximum: Definition, chain: Chain) -> Chain:
    group = {d.name for d in _shifted_by(maximum, chain)}
    kept = [d for d in chain.definitions if d is not maximum]
    moved = tuple(_unshifted(d, chain) if d.name in group else d for d in kept)
    low, high = range_of(next(d for d in chain.definitions if d.name in group).shift.exponent)
    note = f"bound: {low:g} <= exponent <= {high:g}, and results do not change with the shift: no running maximum"
    has_shift = any(d.shift for d in moved)
    notes = (n for n in chain.derivation if has_shift or not n.startswith("shift:"))
    return replace(chain, definitions=moved, derivation=(note, *notes))


def _unshifted(definition: Definition, chain: Chain) -> Definition:
    exponent, middle = definition.shift.exponent, middle_of(definition.shift.exponent, chain)
    moved = apply("sub", exponent, const(middle, exponent.dtype)) if middle else exponent
    weight = apply("exp", moved)
    body = weight
    for factor in definition.rest:
        body = apply("mul", body, factor)
    return replace(definition, shift=None, rest=(weight, *definition.rest), body=body)


ANY = None  # the degree of 0
MIXED = -1000


def _degree(node: Node, group: set[str]) -> int | None:
    """The power of a factor common to all of a group by which a value changes: l → 1, acc / l → 0, acc + 1 → MIXED"""
    if isinstance(node, Const) and node.value == 0:
        return ANY
    if not any(isinstance(n, Ref) and n.name in group for n in walk(node)):
        return 0
    degrees = [_degree(c, group) for c in node.children]
    if MIXED in degrees:
        return MIXED
    match node:
        case Ref():
            return 1
        case Where():
            return _common(degrees[1:]) if degrees[0] in (0, ANY) else MIXED
        case Apply(op="mul"):
            return ANY if ANY in degrees else sum(degrees)
        case Apply(op="div") if degrees[1] is not ANY:
            return ANY if degrees[0] is ANY else degrees[0] - degrees[1]
        case Apply(op="cast" | "neg" | "abs"):
            return degrees[0]
        case Apply(op="add" | "sub" | "maximum" | "minimum"):
            return _common(degrees)
        case Apply(op=op) if op in ORDER and _common(degrees) != MIXED:
            return 0
    return 0 if all(d in (0, ANY) for d in degrees) else MIXED


def _common(degrees: list[int | None]) -> int | None:
    found = {d for d in degrees if d is not ANY}
    return ANY if not found else found.pop() if len(found) == 1 else MIXED
