"""From a program to a chain in normal form: every reduction a sum of products, each with a proved one-pass form.

The rules, in order: split reductions at concatenations; lift masks from scores to predicates; take factors that do not depend on
the stream out of sums (hoist); write what depends on earlier reductions as exp(exponent − Φ(R)) with its action T (shift).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace

from rewriter.derive.chain import Chain, Definition, Shift
from rewriter.derive.factors import (
    Product,
    Term,
    as_product,
    as_terms,
    cancelled,
    conjunction,
    depends_on,
    has_refs,
    multiply,
    quotient,
    split_mask,
    total,
    without_cast,
)
from rewriter.derive.normal import is_bilinear, normalise
from rewriter.derive.prove import prove
from rewriter.ir import (
    TRUE,
    Apply,
    Axis,
    Const,
    Node,
    Output,
    Program,
    Reduce,
    Ref,
    Where,
    apply,
    const,
    fresh_axis,
    index,
    open_reduce,
    rebuild,
    substitute,
    transform,
    walk,
    where,
)
from rewriter.ir.ops import MONOIDS


class NotDerivable(Exception):
    """No rule gives a one-pass form; the text says which reduction and why."""


def derive(program: Program, masked_rows: str = "match") -> Chain:
    """The chain of a program, proved on random values.

    masked_rows: "match" gives rows that see nothing but -inf what eager gives them, "zero" gives zeros.
    Raises NotDerivable."""
    outputs = _aligned(tuple(replace(o, body=normalise(o.body)) for o in program.outputs))
    if all(is_bilinear(o.body) for o in outputs):
        raise NotDerivable(
            "a chain of matrix products without anything between them is left to the matrix products"
        )
    chain = _chain(program, outputs)
    proof = prove(program, chain)
    if not proof.ok:
        raise NotDerivable(f"not proved: {proof.reason}")
    if masked_rows == "zero":
        chain = _chain(program, outputs, empty_is_zero=True)
    return replace(chain, derivation=(*chain.derivation, str(proof)))


def _chain(program: Program, outputs: tuple[Output, ...], empty_is_zero: bool = False) -> Chain:
    builder = _Builder(max((o.axes for o in outputs), key=len), empty_is_zero)
    bodies = [builder.resolved(o.body) for o in outputs]
    if not builder.definitions:
        raise NotDerivable("no reduction is left over a stream")
    if empty_is_zero:
        weights = {d.ref for d in builder.definitions if _sums_exponentials(d)}
        bodies = [transform(b, lambda n: _zero_by_zero(n, weights)) for b in bodies]
    settled = tuple(replace(o, body=b) for o, b in zip(outputs, bodies))
    notes = tuple(dict.fromkeys(builder.notes))
    return Chain(
        program.name, builder.stream, tuple(builder.definitions), settled, notes, program.origins
    )


def _aligned(outputs: tuple[Output, ...]) -> tuple[Output, ...]:
    """Gives all outputs the axes of the longest one, matched in order by extent."""
    longest = max(outputs, key=lambda o: len(o.axes))
    return tuple(o if o is longest else _renamed(o, longest.axes) for o in outputs)


def _renamed(output: Output, axes: tuple[Axis, ...]) -> Output:
    rest, mapping = list(axes), {}
    for axis in output.axes:
        match = next((a for a in rest if a.extent is axis.extent), None)
        if match is None:
            raise NotDerivable("outputs over different axes")
        mapping[axis] = match
        rest = rest[rest.index(match) + 1 :]
    renamed = tuple(mapping[a] for a in output.axes)
    return replace(
        output,
        axes=renamed,
        body=substitute(output.body, {a: index(b) for a, b in mapping.items()}),
    )


@dataclass
class _Builder:
    """Collects definitions while the outputs' reductions are replaced by `Ref`s, innermost dependence first."""

    order: tuple[Axis, ...]
    empty_is_zero: bool
    stream: Axis | None = None
    definitions: list[Definition] = field(default_factory=list)
    known: dict[Node, Node] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def resolved(self, node: Node) -> Node:
        """`node` with every reduction outside others replaced by its value as a `Ref`."""
        if isinstance(node, Reduce):
            if node not in self.known:
                self.known[node] = self._defined(node)
            return self.known[node]
        if not node.children:
            return node
        return rebuild(node, tuple(self.resolved(c) for c in node.children))

    def _defined(self, node: Reduce) -> Node:
        stream = self._stream_of(node)
        _, predicate, body = open_reduce(node, (stream,))
        body = self._resolved_rows(body)
        predicate = self._resolved_rows(predicate)
        if node.op == "sum":
            return self._sum(body, predicate)
        if node.op == "any":
            return self._any(apply("and", predicate, body))
        if node.op == "all":
            return apply("not", self._any(apply("and", predicate, apply("not", body))))
        if node.op == "max":
            mask, body = split_mask(body)
            predicate = apply("and", predicate, mask)
        if node.op in ("max", "min"):
            return self._extremum(node.op, predicate, body)
        if has_refs(body) or has_refs(predicate):
            raise NotDerivable(
                f"{node.op} of a value that depends on an earlier reduction needs another pass"
            )
        return self._add(node.op, predicate, (body,), None, body)

    def _extremum(self, op: str, predicate: Node, body: Node) -> Node:
        """max_n (x + r) → max_n x + r"""
        moving = [t for t in as_terms(body) if depends_on(t.node, self.stream)]
        row = [t for t in as_terms(body) if not depends_on(t.node, self.stream)]
        if not any(has_refs(t.node) for t in row):
            moving, row = as_terms(body), []
        inner = total(moving) if row else body
        if has_refs(inner) or has_refs(predicate):
            raise NotDerivable(
                f"{op} of a value that depends on an earlier reduction needs another pass"
            )
        reduced = self._add(op, predicate, (inner,), None, inner)
        return total([Term(1, reduced), *row])

    def _stream_of(self, node: Reduce) -> Axis:
        if len(node.axes) != 1:
            raise NotDerivable(f"{node.op} over {len(node.axes)} axes at once")
        extent = node.axes[0].extent
        if self.stream is None:
            self.stream = fresh_axis(extent, "n")
        if self.stream.extent is not extent:
            raise NotDerivable(
                f"reductions over different extents ({self.stream.extent!r} and {extent!r}) in one chain"
            )
        return self.stream

    def _resolved_rows(self, node: Node) -> Node:
        """Replaces reductions that do not depend on the stream; inner contractions stay."""
        memo: dict[Node, Node] = {}

        def go(n: Node) -> Node:
            if n not in memo:
                if isinstance(n, Reduce):
                    memo[n] = n if depends_on(n, self.stream) else self.resolved(n)
                else:
                    memo[n] = rebuild(n, tuple(map(go, n.children))) if n.children else n
            return memo[n]

        return go(node)

    def _sum(self, body: Node, predicate: Node) -> Node:
        """sum_n | p: over/under → (row factors) · sum_n | p: (stream factors)"""
        product = as_product(body) if predicate is TRUE else as_product(body).where(predicate)
        parts = [_without_logs(p) for p in self._distributed(product)]
        if len(parts) > 1:
            terms = [Term(1, self._sum(quotient(p.over, p.under), p.predicate)) for p in parts]
            return total(terms)
        (product,) = parts
        _, rest = self._row_part(product.predicate)
        row_over, over = self._sorted(product.over)
        row_under, under = self._sorted(product.under)
        if row_over or row_under:
            self.notes.append(
                "hoist: factors that do not depend on the stream are taken out of the sum"
            )
        return self._hoisted(self._one_sum(over, under, rest), row_over, row_under, product.guards)

    def _hoisted(self, reduced: Node, over: list[Node], under: list[Node], guards: list) -> Node:
        """The row factors of a sum applied to it, each inside the choices that it stood in."""
        for k, (_, inside) in enumerate(guards):
            own = [[f for f in side if f in inside] for side in (over, under)]
            over, under = ([f for f in side if f not in inside] for side in (over, under))
            reduced = _quotient(own[0], reduced, own[1])
            kept = conjunction(p for p, _ in guards[k:])
            gate, rest = self._row_part(kept)
            if rest is not TRUE and any(self._may_be_nan(f, rest) for f in inside):
                gate = self._any(kept)
            reduced = reduced if gate is TRUE else where(gate, reduced, const(0.0))
        return _quotient(over, reduced, under)

    def _may_be_nan(self, factor: Node, predicate: Node) -> bool:
        """Whether a factor is not proved to be a number where the predicate holds nowhere along the stream."""
        held = set(_conjuncts(predicate))

        def emptied(n: Node) -> Node:
            definition = isinstance(n, Ref) and self._definition(n)
            if definition and held <= set(_conjuncts(definition.predicate)):
                return const(MONOIDS[definition.op].neutral, n.dtype)
            return n

        value = transform(factor, emptied)
        numbers = [n.value for n in walk(value) if isinstance(n, Const)]
        is_finite = all(map(math.isfinite, numbers)) and value is not const(0.0, value.dtype)
        return has_refs(factor) and (has_refs(value) or not is_finite)

    def _definition(self, ref: Ref) -> Definition:
        return next(d for d in self.definitions if d.name == ref.name)

    def _any(self, predicate: Node) -> Node:
        """any_n p  →  max_{n | p} 0 = 0"""
        rows, rest = self._row_part(predicate)
        if rest is TRUE:
            return rows
        if has_refs(rest):
            raise NotDerivable("a mask that depends on an earlier reduction needs another pass")
        self.notes.append("any: max of 0 where a mask holds is 0, and -inf where it holds nowhere")
        seen = self._add("max", rest, (const(0.0),), None, const(0.0))
        return apply("and", rows, apply("eq", seen, const(0.0)))

    def _row_part(self, predicate: Node) -> tuple[Node, Node]:
        """(what does not depend on the stream, the rest) of a conjunction."""
        rows, rest = TRUE, TRUE
        for part in _conjuncts(predicate):
            if depends_on(part, self.stream) or not has_refs(part):
                rest = apply("and", rest, part)
            else:
                rows = apply("and", rows, part)
        return rows, rest

    def _sorted(self, factors: list[Node]) -> tuple[list[Node], list[Node]]:
        """(those that do not depend on the stream, those that do)"""
        stays = [f for f in factors if not depends_on(f, self.stream)]
        return stays, [f for f in factors if depends_on(f, self.stream)]

    def _distributed(self, product: Product) -> list[Product]:
        """(a + b)·g → a·g, b·g where a factor mixes the stream with earlier reductions other than through exp."""
        mixed = [self._is_mixed(f) for f in product.over]
        if (
            sum(mixed) > 1
        ):  # sum (v - mean)² written out cancels: 1775 times worse than eager at offset 30
            raise NotDerivable(
                "a product of two sums with earlier reductions (a variance) would cancel when written out"
            )
        for k, factor in enumerate(product.over):
            if mixed[k]:
                rest = replace(product, over=product.over[:k] + product.over[k + 1 :])
                terms = as_terms(factor)
                signed = [as_product(t.node).times(Product([const(float(t.sign))])) for t in terms]
                return [p for s in signed for p in self._distributed(s.times(rest))]
        return [product]

    def _is_mixed(self, factor: Node) -> bool:
        sums = isinstance(factor, Apply) and factor.op in ("add", "sub")
        return sums and has_refs(factor) and depends_on(factor, self.stream)

    def _one_sum(self, over: list[Node], under: list[Node], predicate: Node) -> Node:
        rest = [f for f in over if not _is_exp(f)]
        exponent = [t for f in over if _is_exp(f) for t in as_terms(f.args[0])]
        if any(has_refs(f) for f in [*rest, *under]) or has_refs(predicate):
            raise NotDerivable(
                "a sum whose terms depend on an earlier reduction other than through exp needs another pass"
            )
        if under:
            rest.append(apply("div", const(1.0), multiply(under)))
        if not exponent:
            return self._add("sum", predicate, tuple(rest), None, multiply(rest) or const(1.0))
        shift, mask = self._shift(exponent)
        predicate = apply("and", predicate, mask)
        inner = (
            shift.exponent if shift.phi is const(0.0) else apply("sub", shift.exponent, shift.phi)
        )
        body = multiply([apply("exp", inner), *rest])
        if not has_refs(shift.phi):
            return self._add("sum", predicate, (apply("exp", inner), *rest), None, body)
        self._check_shift(shift, predicate)
        reduced = self._add("sum", predicate, tuple(rest), shift, body)
        return reduced if shift.settled else self._of_empty_rows(reduced, shift)

    def _of_empty_rows(self, reduced: Node, shift: Shift) -> Node:
        """A row whose shift is -inf saw only -inf: eager's exp(-inf + inf) is NaN there, where the kernel sums zeros."""
        if self.empty_is_zero:
            return reduced
        return where(apply("eq", shift.phi, const(-math.inf)), const(math.nan), reduced)

    def _shift(self, terms: list[Term]) -> tuple[Shift, Node]:
        """exp(e − Φ): Φ is what depends on earlier reductions; a −inf mask in e becomes a predicate."""
        if any(has_refs(t.node) and depends_on(t.node, self.stream) for t in terms):
            raise NotDerivable(
                "an exponent in which the stream multiplies an earlier reduction needs another pass"
            )
        settled = any(_is_settled(t.node) for t in terms)
        terms = cancelled([s for t in terms for s in _settled(t)])
        shifted = [Term(-t.sign, t.node) for t in terms if has_refs(t.node)]
        mask, exponent = split_mask(total([t for t in terms if not has_refs(t.node)]))
        return Shift(total(shifted), exponent, settled), mask

    def _check_shift(self, shift: Shift, predicate: Node) -> None:
        """Φ must be a running maximum of the exponent (or above it), or exp could overflow before the end."""
        refs = {n for n in walk(shift.phi) if isinstance(n, Ref)}
        if len(refs) != 1:
            raise NotDerivable("an exponent shifted by several reductions")
        bound = self._definition(next(iter(refs)))
        if bound.op != "max" or not _dominates(shift, bound, self.stream):
            raise NotDerivable(
                f"exp(x − {bound.name}) where {bound.name} is not proved to be at least x"
            )
        if not set(_conjuncts(bound.predicate)) <= {TRUE, *_conjuncts(predicate)}:
            raise NotDerivable(
                f"exp(x − {bound.name}) at positions that are masked in {bound.name}"
            )
        phi = re.sub(
            r"\[[^]]*\]", "", repr(shift.phi)
        )  # by name alone: axes have none that would last
        self.notes.append(
            f"shift: T(old → new) = exp(phi(old) - phi(new)), phi = {phi} at least every exponent seen so far"
        )

    def _add(
        self, op: str, predicate: Node, rest: tuple[Node, ...], shift: Shift | None, body: Node
    ) -> Node:
        for known in self.definitions:
            if (known.op, known.predicate, known.body) == (op, predicate, body):
                return known.ref
        axes = tuple(a for a in self.order if a in (body.free | predicate.free))
        if (body.free | predicate.free) - frozenset(axes) - {self.stream}:
            raise NotDerivable("a reduction over axes that no output has")
        name = f"{op}_{len(self.definitions)}"
        definition = Definition(name, op, axes, predicate, rest, shift, body)
        self.definitions.append(definition)
        return definition.ref


def _without_logs(product: Product) -> Product:
    """exp(x - log y) → exp(x) / y where y is a row's value"""
    out = Product([], list(product.under), [(p, list(inside)) for p, inside in product.guards])
    for factor in product.over:
        terms = as_terms(factor.args[0]) if _is_exp(factor) else []
        logs = [t for t in terms if _is_log(t.node) and has_refs(t.node)]
        over = [t.node.args[0] for t in logs if t.sign > 0]
        under = [t.node.args[0] for t in logs if t.sign < 0]
        rest = [t for t in terms if t not in logs]
        over.append(apply("exp", total(rest)) if logs else factor)
        out.over += over
        out.under += under
        for _, inside in out.guards:
            inside += [*over, *under] if factor in inside else []
    return out


def _settled(term: Term) -> list[Term]:
    """where(isinf(R), 0, R) → R: what the kernel's running shift does, too"""
    node = term.node.other if _is_settled(term.node) else term.node
    return [Term(term.sign * t.sign, t.node) for t in as_terms(node)]


def _is_settled(node: Node) -> bool:
    if not (
        isinstance(node, Where)
        and isinstance(node.predicate, Apply)
        and node.predicate.op == "isinf"
    ):
        return False
    return (
        node.predicate.args[0] is node.other
        and isinstance(node.then, Const)
        and node.then.value == 0
    )


def _conjuncts(predicate: Node) -> list[Node]:
    if isinstance(predicate, Apply) and predicate.op == "and":
        return [p for a in predicate.args for p in _conjuncts(a)]
    return [predicate]


def _quotient(over: list[Node], reduced: Node, under: list[Node]) -> Node:
    """where(empty, NaN, acc) / where(empty, NaN, l)  →  acc / l, which is NaN in empty rows by itself: 0 / 0"""
    values = [reduced, *under]
    if not under or not all(map(_is_nan_if_empty, values)) or len({v.predicate for v in values}) > 1:
        return quotient([*over, reduced], under)
    return quotient([*over, reduced.other], [u.other for u in under])


def _is_nan_if_empty(node: Node) -> bool:
    return isinstance(node, Where) and node.then is const(math.nan)


def _sums_exponentials(definition: Definition) -> bool:
    """A sum that is 0 where nothing is summed, and else is not, save for underflow."""
    return definition.op == "sum" and bool(
        definition.shift or (definition.rest and all(map(_is_exp, definition.rest)))
    )


def _zero_by_zero(node: Node, weights: set[Node]) -> Node:
    """a / l  →  where(l == 0, 0, a / l) where l is among `weights`, or 0, for rows that are to be zero"""
    if not (isinstance(node, Apply) and node.op == "div"):
        return node
    under = without_cast(node.args[1])
    total = under
    while isinstance(total, Where) and total.other is const(0.0):
        total = without_cast(total.then)
    if total not in weights:
        return node
    return where(apply("eq", under, const(0.0)), const(0.0, node.dtype), node)


def _is_exp(node: Node) -> bool:
    return isinstance(node, Apply) and node.op == "exp"


def _is_log(node: Node) -> bool:
    return isinstance(node, Apply) and node.op == "log"


def _dominates(shift: Shift, bound: Definition, stream: Axis) -> bool:
    """Whether Φ stays at or above the exponent, up to a row constant, because R is the maximum of the same expression.

    Φ is R, R scaled by a positive constant as the exponent is, or a maximum of such with anything.
    """
    phi = without_cast(shift.phi)
    if isinstance(phi, Apply) and phi.op == "maximum":
        return any(
            _dominates(Shift(a, shift.exponent), bound, stream) for a in phi.args if has_refs(a)
        )
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
    return Counter(
        (t.sign, without_cast(t.node))
        for t in as_terms(node, everywhere=True)
        if depends_on(t.node, stream)
    )
