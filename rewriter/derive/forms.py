"""The forms in which a sweep computes one reduction: rules that take a body apart until each part can run online.

Hoist, action and moment of the derivation; what none of them fits is left to a sweep after the one it reads.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rewriter.derive.chain import Centre, Definition, Shift
from rewriter.derive.exponentials import (
    dominates,
    has_minus_inf,
    is_exp,
    is_log,
    is_nan_if_empty,
    is_settled,
    is_settled_difference,
    of_rows,
    same_terms,
    sees_nothing,
    settled_terms,
    summands,
    to_base_e,
    without_logs,
)
from rewriter.derive.factors import (
    Product,
    Term,
    as_product,
    as_terms,
    cancelled,
    conjunction,
    conjuncts,
    depends_on,
    has_refs,
    is_running,
    is_truth_cast,
    multiply,
    quotient,
    split_mask,
    total,
    without_cast,
)
from rewriter.derive.filled import unfilled
from rewriter.derive.selection import selected
from rewriter.derive.signs import Signs
from rewriter.derive.variance import CentredSquare, centred_square, is_mean
from rewriter.ir import FALSE, TRUE, Apply, Axis, Const, Load, Node, Ref, Where, apply, const, transform, walk, where
from rewriter.ir.ops import neutral_of

if TYPE_CHECKING:
    from rewriter.derive.builder import Builder


class NotDerivable(Exception):
    """No rule gives a form in this sweep; the text says which reduction and why."""


@dataclass(frozen=True)
class Form:
    """One reduction over `stream`, computed in `sweep`; refs to the same sweep are running values."""

    builder: Builder
    stream: Axis
    sweep: int

    def of(self, op: str, predicate: Node, body: Node) -> Node:
        """The reduction's value in terms of definitions."""
        if op == "sum":
            return self._sum(body, predicate)
        if op == "any":
            return self._any(apply("and", predicate, body))
        if op == "all":
            return apply("not", self._any(apply("and", predicate, apply("not", body))))
        if op == "max":
            mask, body = split_mask(body)
            predicate = apply("and", predicate, mask)
        if op in ("max", "min"):
            return self._extremum(op, predicate, body)
        if is_running(body) or is_running(predicate):
            raise NotDerivable(f"{op} of a value that depends on a reduction of the same sweep")
        return self._add(op, predicate, (body,), None, body)

    def _runs(self, predicate: Node) -> bool:
        """Whether a predicate depends on running values, other than by selecting what has the extremum."""
        _, others = selected(predicate, self._definition)
        return any(map(is_running, others))

    def _add(
        self,
        op: str,
        predicate: Node,
        rest: tuple[Node, ...],
        shift: Shift | None,
        body: Node,
        centre: Centre | None = None,
    ) -> Node:
        extremum, _ = selected(predicate, self._definition)
        if extremum and shift and is_running(shift.phi):
            raise NotDerivable("exponentials shifted by a running value, of what has an extremum")
        if extremum:
            self._note(
                f"selection: T(old → new) keeps a state where {extremum.name} has not moved, and empties it elsewhere"
            )
        return self.builder.add(op, self.stream, self.sweep, predicate, rest, shift, body, extremum, centre)

    def _note(self, text: str) -> None:
        self.builder.notes.append(text)

    def _extremum(self, op: str, predicate: Node, body: Node) -> Node:
        """max_n (x + r) → max_n x + r
        max_n (x · r / s) → max_n x · r / s where r and s are positive
        max_n (exp(x) · r / s) → exp(max_n x) · r / s where r and s are positive"""
        product = as_product(body)
        if is_running(body) and product.predicate is TRUE and not product.guards and not self._runs(predicate):
            over, under = ([f for f in side if is_running(f)] for side in (product.over, product.under))
            scale = [f for f in (*over, *under) if not depends_on(f, self.stream) and self._signs.is_positive(f)]
            if scale:
                kept = ([f for f in side if f not in scale] for side in (product.over, product.under))
                most = self._extremum(op, predicate, quotient(*kept))
                return quotient([most, *(f for f in over if f in scale)], [f for f in under if f in scale])
        exponents = [f.args[0] for f in product.over if is_exp(f) and depends_on(f, self.stream)]
        others = [f for f in (*product.over, *product.under) if not (is_exp(f) and f.args[0] in exponents)]
        if (
            is_running(body)
            and len(exponents) == 1
            and product.predicate is TRUE
            and all(map(self._is_positive, others))
        ):
            most = apply("exp", self._extremum(op, predicate, exponents[0]))
            return quotient([most, *(f for f in product.over if f in others)], product.under)
        moving = [t for t in as_terms(body) if depends_on(t.node, self.stream)]
        row = [t for t in as_terms(body) if not depends_on(t.node, self.stream)]
        if not any(is_running(t.node) for t in row):
            moving, row = as_terms(body), []
        inner = total(moving) if row else body
        if is_running(inner) or self._runs(predicate):
            raise NotDerivable(f"{op} of a value that depends on an earlier reduction of the same sweep")
        reduced = self._add(op, predicate, (inner,), None, inner)
        return total([Term(1, reduced), *row])

    @property
    def _signs(self) -> Signs:
        return Signs(self._definition)

    def _is_positive(self, factor: Node) -> bool:
        """A row's sum of exponentials, NaN aside."""
        value = factor.other if isinstance(factor, Where) and is_nan_if_empty(factor) else factor
        definition = self._definition(value) if isinstance(value, Ref) else None
        return bool(definition and definition.op == "sum" and definition.shift and not definition.rest)

    def _sum(self, body: Node, predicate: Node) -> Node:
        """sum_n | p: over/under → (row factors) · sum_n | p: (stream factors)"""
        product = as_product(body) if predicate is TRUE else as_product(body).where(predicate)
        product = without_logs(to_base_e(self._selecting(product)))
        centred = centred_square(product, self.stream)
        parts = [centred.weights] if centred else self._distributed(product)
        if len(parts) > 1:
            terms = [Term(1, self._sum(quotient(p.over, p.under), p.predicate)) for p in parts]
            return total(terms)
        product = self._apart(*parts)
        _, rest = self._row_part(product.predicate)
        row_over, over = self._sorted(product.over)
        row_under, under = self._sorted(product.under)
        if row_over or row_under:
            self._note("hoist: factors that do not depend on the stream are taken out of the sum")
        return self._hoisted(self._one_sum(over, under, rest, centred), row_over, row_under, product.guards)

    def _apart(self, product: Product) -> Product:
        """where(p, x · v, 0)  →  where(p, x · where(p, v, 0), 0): of a matrix product's operand that is read, what counts
        as 0 may be NaN.
        """

        def of(factor: Node) -> Node:
            inside = [p for p, inside in product.guards if factor in inside and self.stream in p.free <= factor.free]
            is_operand = any(f.free - factor.free for f in product.over if depends_on(f, self.stream))
            is_read = isinstance(without_cast(factor), Load) and is_operand
            return where(conjunction(inside), factor, const(0.0, factor.dtype)) if is_read else factor

        return replace(product, over=[of(f) for f in product.over])

    def _selecting(self, product: Product) -> Product:
        """float(x == R) · v  →  where(x == R, v, 0) where R is the running extremum of x"""
        chosen = [f for f in product.over if is_truth_cast(f) and is_running(f) and not self._runs(f.args[0])]
        if not chosen or any(has_minus_inf(f) for f in product.over if f not in chosen):
            return product
        rest = replace(product, over=[f for f in product.over if f not in chosen])
        return rest.where(conjunction(f.args[0] for f in chosen))

    def _hoisted(self, reduced: Node, over: list[Node], under: list[Node], guards: list) -> Node:
        """The row factors of a sum applied to it, each inside the choices that it stood in."""
        for k, (_, inside) in enumerate(guards):
            own = [[f for f in side if f in inside] for side in (over, under)]
            over, under = ([f for f in side if f not in inside] for side in (over, under))
            reduced = of_rows(own[0], reduced, own[1])
            kept = conjunction(p for p, _ in guards[k:])
            gate, rest = self._row_part(kept)
            if rest is not TRUE and any(self._may_be_nan(f, rest) for f in inside):
                gate = self._any(kept)
            reduced = reduced if gate is TRUE else where(gate, reduced, const(0.0))
        return of_rows(over, reduced, under)

    def _may_be_nan(self, factor: Node, predicate: Node) -> bool:
        """Whether a factor is not proved to be a number where the predicate holds nowhere along the stream."""
        held = set(conjuncts(predicate))

        def emptied(n: Node) -> Node:
            definition = self._definition(n) if isinstance(n, Ref) else None
            if definition and held <= set(conjuncts(definition.predicate)):
                return const(neutral_of(definition.op, n.dtype), n.dtype)
            return n

        value = transform(factor, emptied)
        numbers = [n.value for n in walk(value) if isinstance(n, Const)]
        is_finite = all(map(math.isfinite, numbers)) and value is not const(0.0, value.dtype)
        return has_refs(factor) and (has_refs(value) or not is_finite)

    def _definition(self, ref: Ref) -> Definition:
        return next(d for d in self.builder.definitions if d.name == ref.name)

    def _any(self, predicate: Node) -> Node:
        """any_n p  →  max_{n | p} 0 = 0"""
        rows, rest = self._row_part(predicate)
        if rest is TRUE:
            return rows
        if is_running(rest):
            raise NotDerivable("a mask that depends on a running value")
        self._note("any: max of 0 where a mask holds is 0, and -inf where it holds nowhere")
        rest = unfilled(rest, (), self.stream).predicate
        seen = self._add("max", rest, (const(0.0),), None, const(0.0))
        return apply("and", rows, apply("eq", seen, const(0.0)))

    def _row_part(self, predicate: Node) -> tuple[Node, Node]:
        """(what does not depend on the stream, the rest) of a conjunction."""
        rows, rest = TRUE, TRUE
        for part in conjuncts(predicate):
            if depends_on(part, self.stream) or not is_running(part):
                rest = apply("and", rest, part)
            else:
                rows = apply("and", rows, part)
        return rows, rest

    def _sorted(self, factors: list[Node]) -> tuple[list[Node], list[Node]]:
        """(those that do not depend on the stream, those that do)"""
        stays = [f for f in factors if not depends_on(f, self.stream)]
        return stays, [f for f in factors if depends_on(f, self.stream)]

    def _distributed(self, product: Product) -> list[Product]:
        """(a + b)·g → a·g, b·g where a factor mixes the stream with running values other than through exp."""
        mixed = [self._is_mixed(f) for f in product.over]
        if sum(mixed) > 1:  # sum (v - mean)² written out cancels: 1775 times worse than eager at offset 30
            raise NotDerivable("a product of two sums with running values (a variance) would cancel when written out")
        for k, factor in enumerate(product.over):
            if mixed[k]:
                rest = replace(product, over=product.over[:k] + product.over[k + 1 :])
                return self._split(factor, rest)
        return [product]

    def _split(self, factor: Node, rest: Product) -> list[Product]:
        """A sum's terms as products, an exponent among them kept whole: (e − Φ) + r → (e − Φ)·g, r·g"""
        exponent = cancelled([s for f in rest.over if is_exp(f) for t in as_terms(f.args[0]) for s in settled_terms(t)])
        exponent = [t for t in exponent if not (is_log(t.node) and is_running(t.node))]  # divides, see `without_logs`
        terms = [s for t in as_terms(factor) for s in (settled_terms(t) if exponent else [t])]
        if exponent and not Counter(exponent) - Counter(terms):
            if Counter(exponent) == Counter(terms):
                return [replace(rest, over=[*rest.over, factor])]
            terms = [*(Counter(terms) - Counter(exponent)).elements(), Term(1, total(exponent))]
        terms, about = self._about_extrema(terms)
        self._check_difference(terms)
        signed = [as_product(t.node).times(Product([const(float(t.sign))])) for t in [*terms, *about]]
        return [p for s in signed for p in self._distributed(s.times(rest))]

    def _about_extrema(self, terms: list[Term]) -> tuple[list[Term], list[Term]]:
        """x − R + r  →  where(R = −inf, NaN, 1) · (x − where(R = −inf, 0, R)) + r, R being the running extremum of x"""
        about = []
        for term in terms:
            definition = self._definition(term.node) if isinstance(term.node, Ref) and not term.node.final else None
            if definition is None or definition.op not in ("max", "min") or definition.predicate is not TRUE:
                continue
            own = Counter(Term(-term.sign * t.sign, t.node) for t in as_terms(definition.body))
            if own - Counter(terms):
                continue
            infinite = apply("isinf", term.node)
            away = apply("sub", definition.body, where(infinite, const(0.0), term.node))
            about.append(Term(-term.sign, multiply([where(infinite, const(math.nan), const(1.0)), away])))
            terms = [*(Counter(terms) - own - Counter([term])).elements()]
        return terms, about

    def _check_difference(self, terms: list[Term]) -> None:
        """w − R with a row's own value R: what is common to all values would be summed twice, to cancel in the end. The
        logarithm of a sum of exponentials below their maximum is small."""
        row = [t for t in terms if is_running(t.node) and not depends_on(t.node, self.stream) and not is_log(t.node)]
        moving = {t.sign for t in terms if depends_on(t.node, self.stream)}
        if any(-t.sign in moving for t in row):
            raise NotDerivable("a difference from a value of the same sweep would cancel when written out")

    def _is_mixed(self, factor: Node) -> bool:
        sums = isinstance(factor, Apply) and factor.op in ("add", "sub") and not is_settled_difference(factor)
        return sums and is_running(factor) and depends_on(factor, self.stream)

    def _one_sum(self, over: list[Node], under: list[Node], predicate: Node, centred: CentredSquare | None) -> Node:
        rest = [f for f in over if not is_exp(f)]
        exponent = [t for f in over if is_exp(f) for t in as_terms(f.args[0])]
        aways = [f for f in rest if is_settled_difference(f)]
        rest = [f for f in rest if f not in aways]
        lever = next((f for f in rest if exponent and same_terms(f, exponent)), None)
        rest = [f for f in rest if f is not lever]
        if any(is_running(f) for f in [*rest, *under]) or self._runs(predicate):
            raise NotDerivable("a sum whose terms depend on a running value other than through exp")
        if under:
            rest.append(apply("div", const(1.0), multiply(under)))
        if centred:
            return self._second_moment(centred, exponent, rest, predicate)
        if aways:
            return self._first_moment(aways, exponent, [*rest, *([lever] if lever else [])], predicate)
        if not exponent:
            return self._unshifted(predicate, tuple(rest))
        return self._exponential(exponent, rest, lever, predicate)

    def _unshifted(self, predicate: Node, factors: tuple[Node, ...]) -> Node:
        """A sum of products of what no running value changes, without the terms that a mask makes 0."""
        held = unfilled(predicate, factors, self.stream, self._is_positive)
        apart = {v: f for f in factors if isinstance(f, Where) for v in (f.then, f.other)}
        rest = tuple(apart.get(f, f) for f in held.factors)
        reduced = self._add("sum", held.predicate, rest, None, multiply(list(rest)) or const(1.0))
        return held.of_row(reduced)

    def _exponential(self, terms: list[Term], rest: list[Node], lever: Node | None, predicate: Node) -> Node:
        """sum exp(e − Φ)·rest, shifted where Φ runs"""
        shift, mask = self._shift(terms, keep_mask=any(has_minus_inf(f) for f in [*rest, *([lever] if lever else [])]))
        predicate = apply("and", predicate, mask)
        inner = shift.exponent if shift.phi is const(0.0) else apply("sub", shift.exponent, shift.phi)
        if not is_running(shift.phi):
            rest = [*rest, lever] if lever else rest
            reduced = self._unshifted(predicate, (apply("exp", inner), *rest))
            return reduced if mask is TRUE or not has_refs(shift.phi) else self._of_empty_rows(reduced, shift)
        self._check_shift(shift, predicate)
        reduced = self._add("sum", predicate, tuple(rest), shift, multiply([apply("exp", inner), *rest]))
        if lever:
            reduced = self._moment(reduced, rest, shift, predicate, inner)
        return reduced if shift.settled else self._of_empty_rows(reduced, shift)

    def _weights(
        self, exponent: list[Term], rest: list[Node], predicate: Node
    ) -> tuple[Shift | None, list[Node], list[Node], Node]:
        """(the shift, factors beside the exponential, all factors, the predicate) of weights that a moment has."""
        if not exponent:
            return None, rest, rest, predicate
        shift, mask = self._shift(exponent, keep_mask=False)
        predicate = apply("and", predicate, mask)
        inner = shift.exponent if shift.phi is const(0.0) else apply("sub", shift.exponent, shift.phi)
        factors = [apply("exp", inner), *rest]
        if not is_running(shift.phi):
            return None, factors, factors, predicate
        self._check_shift(shift, predicate)
        return shift, rest, factors, predicate

    def _first_moment(self, aways: list[Node], exponent: list[Term], rest: list[Node], predicate: Node) -> Node:
        """sum w·(x − R) with R the running extremum of x"""
        away, extremum = aways[0], aways[0].args[1].other
        if len(aways) > 1 or predicate is not TRUE:
            raise NotDerivable("differences from an extremum of the same sweep, multiplied or masked")
        shift, weights, factors, predicate = self._weights(exponent, rest, predicate)
        self._note(f"moment: where {extremum.name} falls by delta, a sum of differences gains delta · weight")
        mass = self._add("sum", predicate, tuple(weights), shift, multiply(factors) or const(1.0))
        body = multiply([*factors, away])
        reduced = self._add("sum", predicate, (*weights, away), shift, body, Centre(away.args[1], mass))
        return reduced if shift is None or shift.settled else self._of_empty_rows(reduced, shift)

    def _second_moment(self, square: CentredSquare, exponent: list[Term], rest: list[Node], predicate: Node) -> Node:
        """sum w·(x − mean)² with mean = sum w·x / sum w, all of them running, and w never negative"""
        shift, weights, factors, predicate = self._weights(exponent, rest, predicate)
        if not all(is_exp(f) or is_truth_cast(f) for f in weights):
            raise NotDerivable("a variance by weights that may be negative")
        mass = square.mass or self._add("sum", predicate, (), None, const(1.0))
        made = square.total, mass
        if not is_mean(*map(self._definition, made), weights, square.value, predicate, shift):
            raise NotDerivable("a sum of squares about what is not proved to be their mean")
        if square.empty is not FALSE and not (shift and square.empty is sees_nothing(shift)):
            raise NotDerivable("a sum of squares about a mean that is NaN in some rows")
        self._note(
            "variance: where its mean falls by delta, a sum of squares gains"
            " delta · (2 · first moment + delta · weight)"
        )
        mean = where(apply("eq", mass, const(0.0)), const(0.0), apply("div", *made))
        away = apply("sub", square.value, mean)
        body = multiply([*factors, away])
        first = self._add("sum", predicate, (*weights, away), shift, body, Centre(mean, mass))
        body = multiply([*factors, away, away])
        reduced = self._add("sum", predicate, (*weights, away, away), shift, body, Centre(mean, mass, first))
        return reduced if shift is None or shift.settled else self._of_empty_rows(reduced, shift)

    def _moment(self, mass: Node, rest: list[Node], shift: Shift, predicate: Node, inner: Node) -> Node:
        """sum exp(x)·x with x = e − Φ: where Φ moves by δ, the moment gains −δ times the mass sum exp(x)"""
        self._note("moment: T(old → new)(t) = exp(phi(old) - phi(new)) · (t + (phi(old) - phi(new)) · mass)")
        moved = replace(shift, mass=mass)
        body = multiply([apply("exp", inner), inner, *rest])
        return self._add("sum", predicate, tuple(rest), moved, body)

    def _of_empty_rows(self, reduced: Node, shift: Shift) -> Node:
        """A row whose shift is -inf saw only -inf: eager's exp(-inf + inf) is NaN there, where the kernel sums zeros."""
        if self.builder.empty_is_zero:
            return reduced
        return where(sees_nothing(shift), const(math.nan), reduced)

    def _shift(self, terms: list[Term], keep_mask: bool) -> tuple[Shift, Node]:
        """exp(e − Φ): Φ is what depends on running values; a −inf mask in e becomes a predicate."""
        if any(is_running(t.node) and depends_on(t.node, self.stream) for t in terms):
            raise NotDerivable("an exponent in which the stream multiplies a running value")
        settled = any(is_settled(t.node) for t in terms)
        terms = cancelled([s for t in terms for s in settled_terms(t)])
        runs = any(is_running(t.node) for t in terms)
        moving = [
            t
            for t in terms
            if (is_running(t.node) if runs else has_refs(t.node) and not depends_on(t.node, self.stream))
        ]
        exponent = total([t for t in terms if t not in moving])
        mask, exponent = (TRUE, exponent) if keep_mask else split_mask(exponent)
        phi = total([Term(-t.sign, t.node) for t in moving])
        return Shift(phi, self._as_bounded(exponent, phi), settled), mask

    def _as_bounded(self, exponent: Node, phi: Node) -> Node:
        """The exponent as the maximum's definition writes it, where it is the same sum: it is computed once."""
        for name in {n.name for n in walk(phi) if isinstance(n, Ref)}:
            body = next(d.body for d in self.builder.definitions if d.name == name)
            if summands(body) == summands(exponent):
                return body
        return exponent

    def _check_shift(self, shift: Shift, predicate: Node) -> None:
        """Φ must be a running maximum of the exponent (or above it), or exp could overflow before the end."""
        refs = {n for n in walk(shift.phi) if isinstance(n, Ref) and not n.final}
        if len(refs) != 1:
            raise NotDerivable("an exponent shifted by several running values")
        bound = self._definition(next(iter(refs)))
        if bound.op != "max" or not dominates(shift, bound, self.stream):
            raise NotDerivable(f"exp(x − {bound.name}) where {bound.name} is not proved to be at least x")
        if not set(conjuncts(bound.predicate)) <= {TRUE, *conjuncts(predicate)}:
            raise NotDerivable(f"exp(x − {bound.name}) at positions that are masked in {bound.name}")
        # By name alone: axes have none that would last.
        phi = re.sub(r"\[[^]]*\]", "", repr(shift.phi))
        self._note(f"shift: T(old → new) = exp(phi(old) - phi(new)), phi = {phi} at least every exponent seen so far")
