"""Exponentials and logarithms in the terms of a sum: what a body of one is made of."""

from __future__ import annotations

import math
from collections import Counter

from rewriter.derive.chain import Definition, Shift
from rewriter.derive.factors import (
    Product,
    Term,
    as_terms,
    cancelled,
    depends_on,
    is_running,
    quotient,
    total,
    without_cast,
)
from rewriter.ir import Apply, Axis, Const, Node, Ref, Where, apply, const, walk


def sees_nothing(shift: Shift) -> Node:
    """Which rows have seen nothing but -inf."""
    return apply("eq", shift.phi, const(-math.inf))


def to_base_e(product: Product) -> Product:
    """2^(x - R) → exp((x - R) · ln 2) where R runs, and so for other constant bases"""
    bases = {f: _base(f) for f in product.over if is_running(f)}
    known = {f: apply("exp", apply("mul", f.args[-1], const(math.log(b)))) for f, b in bases.items() if b}

    def of(factors: list[Node]) -> list[Node]:
        return [known.get(f, f) for f in factors]

    return Product(of(product.over), product.under, [(p, of(inside)) for p, inside in product.guards])


def _base(node: Node) -> float | None:
    """What a power has been raised from, where it is a constant above 1."""
    if isinstance(node, Apply) and node.op == "exp2":
        return 2.0
    if isinstance(node, Apply) and node.op == "pow" and isinstance(node.args[0], Const) and node.args[0].value > 1:
        return float(node.args[0].value)
    return None


def without_logs(product: Product) -> Product:
    """exp(x - log y) → exp(x) / y where y is a row's value; exp(x - a + a) → exp(x)"""
    out = Product([], list(product.under), [(p, list(inside)) for p, inside in product.guards])
    for factor in product.over:
        terms = cancelled(as_terms(factor.args[0])) if is_exp(factor) else []
        logs = [t for t in terms if is_log(t.node) and is_running(t.node)]
        over = [t.node.args[0] for t in logs if t.sign > 0]
        under = [t.node.args[0] for t in logs if t.sign < 0]
        rest = [t for t in terms if t not in logs]
        over.append(apply("exp", total(rest)) if is_exp(factor) else factor)
        out.over += over
        out.under += under
        for _, inside in out.guards:
            inside += [*over, *under] if factor in inside else []
    return out


def same_terms(factor: Node, exponent: list[Term]) -> bool:
    """Whether a factor is what the exponential beside it is of: x·exp(x)"""
    own, others = ([s for t in terms for s in settled_terms(t)] for terms in (as_terms(factor), exponent))
    return Counter(cancelled(own)) == Counter(cancelled(others))


def settled_terms(term: Term) -> list[Term]:
    """where(isinf(R), 0, R) → R: what the kernel's running shift does, too"""
    node = term.node.other if is_settled(term.node) else term.node
    return [Term(term.sign * t.sign, t.node) for t in as_terms(node)]


def is_settled(node: Node) -> bool:
    if not (isinstance(node, Where) and isinstance(node.predicate, Apply) and node.predicate.op == "isinf"):
        return False
    return node.predicate.args[0] is node.other and isinstance(node.then, Const) and node.then.value == 0


def of_rows(over: list[Node], reduced: Node, under: list[Node]) -> Node:
    """where(empty, NaN, acc) / where(empty, NaN, l)  →  acc / l, which is NaN in empty rows by itself: 0 / 0"""
    values = [reduced, *under]
    if not under or not all(map(is_nan_if_empty, values)) or len({v.predicate for v in values}) > 1:
        return quotient([*over, reduced], under)
    return quotient([*over, reduced.other], [u.other for u in under])


def is_nan_if_empty(node: Node) -> bool:
    return isinstance(node, Where) and node.then is const(math.nan)


def is_exp(node: Node) -> bool:
    return isinstance(node, Apply) and node.op == "exp"


def is_settled_difference(node: Node) -> bool:
    """x − where(isinf(R), 0, R): what `_about_extrema` makes"""
    return isinstance(node, Apply) and node.op == "sub" and is_running(node.args[1]) and is_settled(node.args[1])


def is_log(node: Node) -> bool:
    return isinstance(node, Apply) and node.op == "log"


def dominates(shift: Shift, bound: Definition, stream: Axis) -> bool:
    """Whether Φ stays at or above the exponent, up to a row constant, because R is the maximum of the same expression.

    Φ is R, several times R as the exponent is, R scaled by a positive constant, or a maximum of such with anything.
    """
    phi = without_cast(shift.phi)
    copies = [t.sign * isinstance(t.node, Ref) for t in as_terms(phi)]
    if len(copies) > 1 and all(n == 1 for n in copies):
        once = _stream_terms(bound.body, stream)
        return _stream_terms(shift.exponent, stream) == Counter({t: n * len(copies) for t, n in once.items()})
    if isinstance(phi, Apply) and phi.op == "maximum":
        return any(dominates(Shift(a, shift.exponent), bound, stream) for a in phi.args if is_running(a))
    moving = _stream_terms(shift.exponent, stream)
    if isinstance(phi, Ref):
        return moving == _stream_terms(bound.body, stream)
    if isinstance(phi, Apply) and phi.op in ("mul", "div"):
        value, factor = phi.args if isinstance(without_cast(phi.args[0]), Ref) else phi.args[::-1]
        if isinstance(without_cast(value), Ref) and isinstance(factor, Const) and factor.value > 0:
            return moving == _stream_terms(apply(phi.op, bound.body, factor), stream)
    return False


def _stream_terms(node: Node, stream: Axis) -> Counter:
    """The summands that move along the stream, as a multiset."""
    terms = [s for t in as_terms(node, everywhere=True) for s in settled_terms(t)]
    return Counter((t.sign, without_cast(t.node)) for t in terms if depends_on(t.node, stream))


def summands(node: Node) -> Counter:
    return Counter((t.sign, without_cast(t.node)) for t in as_terms(node))


def has_minus_inf(node: Node) -> bool:
    return any(isinstance(n, Const) and n.value == -math.inf for n in walk(node))
