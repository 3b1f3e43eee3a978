"""Products and sums taken apart: what a reduction's body is made of."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from rewriter.ir import TRUE, Apply, Axis, Const, Load, Node, Ref, Where, apply, const, walk, where

Guard = tuple[Node, list[Node]]  # a choice of 0, and the factors inside


@dataclass
class Product:
    """body = predicate ? ∏ over / ∏ under : 0

    `guards` say of each choice, innermost first, what stands inside: (predicate, factors). Where it fails they count
    as 0, be they NaN.
    """

    over: list[Node] = field(default_factory=list)
    under: list[Node] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)

    @property
    def predicate(self) -> Node:
        return conjunction(p for p, _ in self.guards)

    def times(self, other: Product) -> Product:
        return Product(self.over + other.over, self.under + other.under, self.guards + other.guards)

    def inverse(self) -> Product:
        return Product(self.under, self.over, self.guards)

    def where(self, predicate: Node) -> Product:
        """predicate ? self : 0"""
        return Product(self.over, self.under, [*self.guards, (predicate, self.over + self.under)])


def conjunction(predicates: Iterable[Node]) -> Node:
    return functools.reduce(lambda a, b: apply("and", a, b), predicates, TRUE)


def is_float_cast(node: Node) -> bool:
    """A conversion between floating types: rounding may be skipped."""
    return isinstance(node, Apply) and node.op == "cast" and _float(node.dtype) and _float(node.args[0].dtype)


def is_truth_cast(node: Node) -> bool:
    """1 where something holds, 0 elsewhere."""
    return isinstance(node, Apply) and node.op == "cast" and node.args[0].dtype is torch.bool


def without_cast(node: Node) -> Node:
    return without_cast(node.args[0]) if is_float_cast(node) else node


def _float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def as_product(node: Node) -> Product:
    """Flattens mul, div, neg, abs, `where(p, x, 0)` and `where(p, x, -x)`; division keeps its predicate only in the
    numerator.
    """
    if is_float_cast(node):
        return as_product(node.args[0])
    if isinstance(node, Where) and _is_zero(node.other):
        return as_product(node.then).where(node.predicate)
    if isinstance(node, Where) and _is_zero(node.then):
        return as_product(node.other).where(apply("not", node.predicate))
    if isinstance(node, Where) and node.other is apply("neg", node.then):
        sign = where(node.predicate, const(1.0, node.dtype), const(-1.0, node.dtype))
        return Product([sign]).times(as_product(node.then))
    if isinstance(node, Apply) and node.dtype.is_floating_point:
        if node.op == "mul":
            return as_product(node.args[0]).times(as_product(node.args[1]))
        if node.op == "div":
            below = as_product(node.args[1])
            if below.predicate is TRUE:
                return as_product(node.args[0]).times(below.inverse())
            return as_product(node.args[0]).times(Product(under=[node.args[1]]))
        if node.op == "neg":
            return Product([const(-1.0)]).times(as_product(node.args[0]))
        if node.op == "abs":
            return _magnitude(as_product(node.args[0]))
    return Product([node])


def _magnitude(product: Product) -> Product:
    """|a · exp(x) / b|  →  |a| · exp(x) / |b|"""

    def of(factors: list[Node]) -> list[Node]:
        return [f if isinstance(f, Apply) and f.op == "exp" else apply("abs", f) for f in factors]

    return Product(of(product.over), of(product.under), [(p, of(inside)) for p, inside in product.guards])


def _is_zero(node: Node) -> bool:
    return isinstance(node, Const) and node.value == 0


def multiply(nodes: list[Node]) -> Node | None:
    """The product of nodes in fp32, None for none."""
    out: Node | None = None
    for node in nodes:
        out = node if out is None else apply("mul", out, node)
    return out


def quotient(over: list[Node], under: list[Node]) -> Node:
    top = multiply(over) or const(1.0)
    bottom = multiply(under)
    return top if bottom is None else apply("div", top, bottom)


@dataclass(frozen=True)
class Term:
    """One summand, sign included."""

    sign: int
    node: Node


def as_terms(node: Node, everywhere: bool = False) -> list[Term]:
    """Flattens add, sub, neg, and multiplication or division of a sum by one factor.

    Such a sum stays whole where it holds no earlier reduction, unless wanted `everywhere`: (1 - keep) * -1e4 written
    out cancels.
    """
    if is_float_cast(node):
        return as_terms(node.args[0], everywhere)
    if not isinstance(node, Apply) or not node.dtype.is_floating_point:
        return [Term(1, node)]
    match node.op:
        case "add" | "sub":
            left, right = (as_terms(a, everywhere) for a in node.args)
            return left + (negated(right) if node.op == "sub" else right)
        case "neg":
            return negated(as_terms(node.args[0], everywhere))
        case "mul" | "div":
            return _distributed(node, everywhere)
        case "maximum":
            return _common(node)
    return [Term(1, node)]


def negated(terms: list[Term]) -> list[Term]:
    return [Term(-t.sign, t.node) for t in terms]


def _distributed(node: Apply, everywhere: bool) -> list[Term]:
    over, factor = node.args
    left = as_terms(over, everywhere) if everywhere or has_refs(over) else []
    if len(left) > 1:
        return [Term(t.sign, apply(node.op, t.node, factor)) for t in left]
    right = as_terms(factor, everywhere) if everywhere or has_refs(factor) else []
    if node.op == "mul" and len(right) > 1:
        return [Term(t.sign, apply("mul", over, t.node)) for t in right]
    return [Term(1, node)]


def _common(node: Apply) -> list[Term]:
    """maximum(a + c, b + c) → maximum(a, b) + c"""
    left, right = (as_terms(a) for a in node.args)
    shared = [t for t in left if t in right and not isinstance(t.node, Const)]
    if not shared:
        return [Term(1, node)]
    rest = [total([t for t in side if t not in shared]) for side in (left, right)]
    return [Term(1, apply("maximum", *rest)), *shared]


def cancelled(terms: list[Term]) -> list[Term]:
    """x - x → nothing (both are the same value, so also the same infinity or NaN decided elsewhere)"""
    left: list[Term] = []
    for term in terms:
        opposite = Term(-term.sign, term.node)
        left.remove(opposite) if opposite in left else left.append(term)
    return left


def total(terms: list[Term]) -> Node:
    """The sum of terms; 0 for none."""
    ordered = sorted(cancelled(terms), key=lambda t: -t.sign)
    if not ordered:
        return const(0.0)
    out = ordered[0].node if ordered[0].sign > 0 else apply("neg", ordered[0].node)
    for term in ordered[1:]:
        out = apply("add" if term.sign > 0 else "sub", out, term.node)
    return out


def depends_on(node: Node, axis: Axis) -> bool:
    return axis in node.free


def has_refs(node: Node) -> bool:
    """Whether a value depends on earlier reductions of the chain."""
    return any(isinstance(n, Ref) for n in walk(node))


def is_running(node: Node) -> bool:
    """Whether a value depends on reductions that are still running in this sweep."""
    return any(isinstance(n, Ref) and not n.final for n in walk(node))


def conjuncts(predicate: Node) -> list[Node]:
    """The parts of a conjunction."""
    if isinstance(predicate, Apply) and predicate.op == "and":
        return [p for a in predicate.args for p in conjuncts(a)]
    return [predicate]


def split_mask(node: Node) -> tuple[Node, Node]:
    """(predicate, value): `where(p, s, -inf)` and `s + where(p, 0, -inf)` → (p, s), through casts, sums, rounding and
    factors above 0; `s + mask` → (mask != -inf, s + mask) where the mask is a tensor that had -inf when it was traced.
    """
    terms, kept, predicate = as_terms(node), [], TRUE
    for term in terms:
        p, value = _unmasked(term)
        predicate = apply("and", predicate, p)
        if not _is_zero(value):
            kept.append(Term(term.sign, value))
    return predicate, node if predicate is TRUE or kept == terms else total(kept)


def _unmasked(term: Term) -> tuple[Node, Node]:
    node = term.node
    if term.sign < 0:
        return TRUE, node
    match node:
        case Where(predicate=p, then=kept, other=low) if _is_minus_inf(low):
            inner, value = split_mask(kept)
            return apply("and", p, inner), value
        case Where(predicate=p, then=low, other=kept) if _is_minus_inf(low):
            inner, value = split_mask(kept)
            return apply("and", apply("not", p), inner), value
        case Load() if node.tensor.masks == -math.inf:
            return apply("ne", node, const(-math.inf, node.dtype)), node
        case Apply(op="round16", args=(inside,)):
            p, value = split_mask(inside)
            return p, node if value is inside else apply("round16", value)
        case Apply(op="mul" | "div" as op, args=(inside, Const(value=factor) as by)) if 0 < factor < math.inf:
            p, value = split_mask(inside)
            return p, node if value is inside else apply(op, value, by)
    return TRUE, node


def _is_minus_inf(node: Node) -> bool:
    return isinstance(node, Const) and node.value == -math.inf
