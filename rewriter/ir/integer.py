"""Normal form of integer nodes: polynomials over sizes, axis positions and loaded integers, with floor-division by
sizes.

sympy keeps `floor(j / h)` although 0 ≤ j < h, so the rules that need ranges are here:

    (a·D + r) // D  →  a + r // D          r // D  →  0   where 0 ≤ r < D,   -1   where -D ≤ r < 0
    (a·D + r) %  D  →  r % D               r %  D  →  r   where 0 ≤ r < D
    (a·D + r) // (D·E)  →  a // E          (a·D + r) % (D·E)  →  a % E · D + r     where 0 ≤ r < D
    (x // A) // B   →  x // (A·B)          (x % (A·B)) // A  stays
    (a·C + r) // (b·C)  →  a // b          where 0 ≤ r < C
    r // D  →  (r + D) // D - 1            r %  D  →  (r + D) % D   where -D ≤ r < D
    min(x, y)       →  x                   where x ≤ y
    x // D · D + x % D  →  x
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache

import torch

from rewriter.ir.nodes import Apply, Const, Index, Node, Param

Monomial = tuple[Node, ...]
Poly = dict[Monomial, int]


@cache
def _order(node: Node) -> str:
    return repr(node)


def to_poly(node: Node) -> Poly:
    """The polynomial of an integer node; what is no polynomial becomes an atom."""
    if isinstance(node, Const):
        return {(): int(node.value)} if node.value else {}
    if isinstance(node, Apply) and node.op in ("add", "sub", "mul", "neg"):
        parts = [to_poly(a) for a in node.args]
        match node.op:
            case "add":
                return plus(parts[0], parts[1])
            case "sub":
                return plus(parts[0], parts[1], -1)
            case "mul":
                return times(parts[0], parts[1])
            case "neg":
                return plus({}, parts[0], -1)
    return {(node,): 1}


def plus(a: Poly, b: Poly, sign: int = 1) -> Poly:
    out = Counter(a)
    for monomial, coefficient in b.items():
        out[monomial] += sign * coefficient
    return {m: c for m, c in out.items() if c}


def times(a: Poly, b: Poly) -> Poly:
    out: Counter = Counter()
    for m1, c1 in a.items():
        for m2, c2 in b.items():
            out[tuple(sorted(m1 + m2, key=_order))] += c1 * c2
    return {m: c for m, c in out.items() if c}


def _rejoined(poly: Poly) -> Poly:
    """c·(x % D) + c·(x // D)·D  →  c·x"""
    for monomial, coefficient in poly.items():
        for rest in (a for a in monomial if isinstance(a, Apply) and a.op == "mod"):
            outer = list(monomial)
            outer.remove(rest)
            scale = {tuple(outer): coefficient}
            whole = times(scale, times(to_poly(floordiv(*rest.args)), to_poly(rest.args[1])))
            if whole.items() <= poly.items():
                joined = plus(plus(poly, whole, -1), {monomial: coefficient}, -1)
                return _rejoined(plus(joined, times(scale, to_poly(rest.args[0]))))
    return poly


def from_poly(poly: Poly) -> Node:
    """The canonical node: terms sorted, positive ones first."""
    poly = _rejoined(poly)
    terms = sorted(poly.items(), key=lambda t: (t[1] < 0, not t[0], [_order(n) for n in t[0]]))
    out: Node | None = None
    for monomial, coefficient in terms:
        factors = list(monomial)
        size = abs(coefficient) if out is not None else coefficient
        if size != 1 or not factors:
            factors.append(Const(size))
        term = factors[0]
        for factor in factors[1:]:
            term = Apply("mul", (term, factor), torch.int64)
        if out is None:
            out = term
        else:
            out = Apply("sub" if coefficient < 0 else "add", (out, term), torch.int64)
    return Const(0) if out is None else out


def _bound(node: Node) -> tuple[Node | None, Node | None]:
    """(least, greatest) value of an atom, None where unknown."""
    if isinstance(node, Index):
        return Const(0), from_poly(plus(to_poly(node.axis.extent), {(): 1}, -1))
    if isinstance(node, Param):
        return Const(1), None
    if isinstance(node, Apply) and node.op == "mod" and nonnegative(to_poly(node.args[1])):
        return Const(0), from_poly(plus(to_poly(node.args[1]), {(): 1}, -1))
    if isinstance(node, Apply) and node.op == "floordiv" and _is_plain(node):
        return Const(0), _greatest_quotient(node)
    if is_extremum(node) and nonnegative({(node,): 1}):
        return Const(0), None
    return None, None


def is_extremum(node: Node) -> bool:
    """min(a, b) or max(a, b): its value is that of one of its arguments."""
    return isinstance(node, Apply) and node.op in ("minimum", "maximum")


def _is_plain(node: Apply) -> bool:
    """A quotient of nothing negative by something positive."""
    top, under = map(to_poly, node.args)
    return nonnegative(top) and nonnegative(plus(under, {(): 1}, -1))


def _greatest_quotient(node: Apply) -> Node | None:
    """The quotient of the greatest dividend; that dividend itself where the quotient tells no more."""
    top = extreme(to_poly(node.args[0]), greatest=True)
    if top is None:
        return None
    quotient = floordiv(from_poly(top), node.args[1])
    return from_poly(top) if any(not isinstance(a, Param) for m in to_poly(quotient) for a in m) else quotient


def extreme(poly: Poly, greatest: bool) -> Poly | None:
    """A polynomial in the sizes alone that bounds `poly` from above (or below); None where no bound is known."""
    return _replaced(poly, greatest, lambda atom: True)


def _replaced(poly: Poly, greatest: bool, wanted: Callable[[Node], bool]) -> Poly | None:
    """`poly` with every wanted atom at its bound, where no atom is negative."""
    out: Poly = {}
    for monomial, coefficient in poly.items():
        term: Poly = {(): coefficient}
        for atom in monomial:
            if isinstance(atom, Param):
                term = times(term, {(atom,): 1})
                continue
            low, high = _bound(atom)
            if low is None or not nonnegative(to_poly(low)):
                return None
            pick = (high if (coefficient > 0) == greatest else low) if wanted(atom) else atom
            if pick is None:
                return None
            term = times(term, to_poly(pick))
        out = plus(out, term)
    return out


@cache
def _nonnegative(items: frozenset) -> bool:
    poly = dict(items)
    choice = next((a for m in poly for a in m if is_extremum(a)), None)
    if choice is not None:
        return _in_its_cases(poly, choice)
    # An end that depends on another index is taken first: n < m + 1 tells more before m is at an end of its own.
    inner = _replaced(poly, False, lambda atom: isinstance(atom, Index) and bool(atom.axis.extent.free))
    if inner is not None and inner != poly:
        return nonnegative(inner)
    placed = _replaced(poly, False, lambda atom: isinstance(atom, Index))
    if placed is None or placed != poly:
        return placed is not None and nonnegative(placed)
    bottom = extreme(poly, greatest=False)
    if bottom is None or bottom != poly:
        return bottom is not None and nonnegative(bottom)
    shifted: Poly = {}
    for monomial, coefficient in bottom.items():
        term: Poly = {(): coefficient}
        for atom in monomial:
            term = times(term, {(atom,): 1, (): 1})
        shifted = plus(shifted, term)
    return all(c >= 0 for c in shifted.values())


def _in_its_cases(poly: Poly, choice: Apply) -> bool:
    """Whether 0 ≤ poly for every argument that min or max may be; for one, where the others only add to it."""
    signs = {c > 0 for m, c in poly.items() if choice in m}
    alone = all(m.count(choice) == len(m) == 1 for m in poly if choice in m)
    helps = alone and signs == {choice.op == "maximum"}
    cases = (nonnegative(_with(poly, choice, to_poly(a))) for a in choice.args)
    return any(cases) if helps else all(cases)


def _with(poly: Poly, old: Node, new: Poly) -> Poly:
    out: Poly = {}
    for monomial, coefficient in poly.items():
        term: Poly = {(): coefficient}
        for atom in monomial:
            term = times(term, new if atom is old else {(atom,): 1})
        out = plus(out, term)
    return out


def nonnegative(poly: Poly) -> bool:
    """True where 0 ≤ poly is proved, every size being at least 1 and every index within its extent."""
    return _nonnegative(frozenset(poly.items()))


def proves(op: str, a: Node, b: Node) -> bool:
    """True where `a op b` (op in 'lt', 'le', 'eq') holds for all sizes and indices."""
    if op == "eq":
        return a is b or not plus(to_poly(a), to_poly(b), -1)
    gap = plus(to_poly(b), to_poly(a), -1)
    return nonnegative(plus(gap, {(): 1}, -1) if op == "lt" else gap)


def _split(poly: Poly, divisor: Poly) -> tuple[Poly, Poly] | None:
    """poly = quotient·divisor + rest. Of a longer divisor the quotient is that by its first term, or one less, where the
    rest is less than the divisor; None where it is not.
    """
    if len(divisor) == 1:
        return _split_by_term(poly, divisor)
    if poly == divisor:
        return {(): 1}, {}
    term = max(divisor, key=lambda m: (len(m), [_order(a) for a in m]))
    many = {m: c - c % divisor[term] for m, c in poly.items() if set(term) <= set(m) and c // divisor[term]}
    quotient, left = _split_by_term(many, {term: divisor[term]})
    rest = plus(poly, times(quotient, divisor), -1)
    if not term or left:
        return None
    splits = (quotient, rest), (plus(quotient, {(): -1}), plus(rest, divisor))
    return next((s for s in splits if _is_rest(s[1], divisor)), None)


def _is_rest(rest: Poly, divisor: Poly) -> bool:
    """0 ≤ rest < divisor"""
    return nonnegative(rest) and nonnegative(plus(plus(divisor, rest, -1), {(): 1}, -1))


def _is_within_one(rest: Poly, divisor: Poly) -> bool:
    """-divisor ≤ rest < divisor, where it is not known to be a rest."""
    return not nonnegative(rest) and nonnegative(plus(rest, divisor)) and _is_rest({}, plus(divisor, rest, -1))


def _split_by_term(poly: Poly, divisor: Poly) -> tuple[Poly, Poly]:
    """Of 3·D by 2·D the quotient is 1, and D the rest."""
    (dm, dc), need = next(iter(divisor.items())), Counter()
    need.update(dm)
    quotient: Poly = {}
    rest: Poly = {}
    for monomial, coefficient in poly.items():
        have = Counter(monomial)
        whole = abs(coefficient) // abs(dc) if all(have[a] >= k for a, k in need.items()) else 0
        whole = whole if coefficient * dc > 0 else -whole
        if whole:
            quotient[tuple(sorted((have - need).elements(), key=_order))] = whole
        if coefficient != whole * dc:
            rest[monomial] = coefficient - whole * dc
    return quotient, rest


def _reduced(poly: Poly, divisor: Poly) -> tuple[Poly, Poly, Poly, Poly] | None:
    """(a, E, D, r) where poly = a·D + r and divisor = D·E, for 0 ≤ r < D; None where there are none."""
    if len(divisor) != 1 or not nonnegative(plus(divisor, {(): 1}, -1)):
        return None
    monomial, coefficient = next(iter(divisor.items()))
    for term, count in poly.items():
        shared = {tuple((Counter(term) & Counter(monomial)).elements()): math.gcd(count, coefficient)}
        quotient, rest = _split(poly, shared)
        left, _ = _split(divisor, shared)
        is_part = shared != divisor and shared != {(): 1}
        if is_part and nonnegative(rest) and nonnegative(plus(plus(shared, rest, -1), {(): 1}, -1)):
            return quotient, left, shared, rest
    return None


def _content(poly: Poly) -> tuple[Poly, Poly]:
    """(what all terms are multiples of, the rest): 211·s - 211  →  211, s - 1"""
    size = math.gcd(*poly.values())
    first, *more = (Counter(a for a in m if isinstance(a, Param)) for m in poly)
    for other in more:
        first &= other
    common = {tuple(sorted(first.elements(), key=_order)): size}
    return common, _split(poly, common)[0]


@cache
def floordiv(a: Node, b: Node) -> Node:
    """a // b in normal form (rounding down)."""
    pa, pb = to_poly(a), to_poly(b)
    if pb == {(): 1} or not pa:
        return from_poly(pa)
    if isinstance(a, Const) and isinstance(b, Const):
        return Const(int(a.value) // int(b.value))
    split = _split(pa, pb)
    if split:
        quotient, rest = split
        if _is_rest(rest, pb):
            return from_poly(quotient)
        if nonnegative(plus(pb, rest)) and nonnegative(plus({(): -1}, rest, -1)):
            return from_poly(plus(quotient, {(): -1}))
        if quotient:
            return from_poly(plus(quotient, to_poly(floordiv(from_poly(rest), b))))
    if reduced := _reduced(pa, pb):
        return floordiv(from_poly(reduced[0]), from_poly(reduced[1]))
    common, others = _content(pb)
    if len(pb) > 1 and common != {(): 1}:
        whole = floordiv(a, from_poly(common))
        if not any(isinstance(n, Apply) and n.op == "floordiv" for m in to_poly(whole) for n in m):
            return floordiv(whole, from_poly(others))
    if _is_within_one(pa, pb):
        above = Apply("floordiv", (from_poly(plus(pa, pb)), from_poly(pb)), torch.int64)
        return from_poly({(above,): 1, (): -1})
    a = from_poly(pa)
    if isinstance(a, Apply) and a.op == "floordiv" and nonnegative(plus(to_poly(a.args[1]), {(): 1}, -1)):
        return floordiv(a.args[0], from_poly(times(to_poly(a.args[1]), pb)))
    return Apply("floordiv", (a, from_poly(pb)), torch.int64)


@cache
def mod(a: Node, b: Node) -> Node:
    """a % b in normal form (the sign of b, as torch.remainder)."""
    pa, pb = to_poly(a), to_poly(b)
    if pb == {(): 1} or not pa:
        return Const(0)
    if isinstance(a, Const) and isinstance(b, Const):
        return Const(int(a.value) % int(b.value))
    split = _split(pa, pb)
    rest = split[1] if split else pa
    if _is_within_one(rest, pb):
        rest = plus(rest, pb)
    if not rest or _is_rest(rest, pb):
        return from_poly(rest)
    if reduced := _reduced(rest, pb):
        above, below, factor, last = reduced
        return from_poly(plus(times(to_poly(mod(from_poly(above), from_poly(below))), factor), last))
    rest_node = from_poly(rest)
    if isinstance(rest_node, Apply) and rest_node.op == "mod" and rest_node.args[1] is from_poly(pb):
        return rest_node
    return Apply("mod", (rest_node, from_poly(pb)), torch.int64)


def extremum(op: str, a: Node, b: Node) -> Node:
    """min or max of two integer nodes ('minimum', 'maximum'): the one proved to be it, else both, a number last."""
    for first, second in ((a, b), (b, a)):
        if proves("le", first, second):
            return first if op == "minimum" else second
    return Apply(op, tuple(sorted((a, b), key=lambda n: (isinstance(n, Const), _order(n)))), torch.int64)


def product(nodes: Iterable[Node]) -> Node:
    """The product of integer nodes in normal form."""
    out: Poly = {(): 1}
    for node in nodes:
        out = times(out, to_poly(node))
    return from_poly(out)
