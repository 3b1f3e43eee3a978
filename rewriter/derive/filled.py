"""Terms of a sum that are 0 where a program masks: f(where(p, s, c)) is f(s) where p holds, and f(c) = 0 elsewhere.

    sum_n sigmoid(where(p, s[n], -inf)) · v[n]  →  sum_{n | p} sigmoid(s[n]) · v[n]

What is -inf less a row's own value R is -inf, unless R is, too: then each term is NaN, and so is the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rewriter.derive.factors import has_refs, is_truth_cast
from rewriter.ir import (
    FALSE,
    TRUE,
    Apply,
    Axis,
    Const,
    Load,
    Node,
    Reduce,
    Ref,
    Where,
    apply,
    const,
    transform,
    walk,
    where,
)

ARITHMETIC = ("add", "sub", "mul", "div", "maximum", "minimum", "neg")


@dataclass(frozen=True)
class Unfilled:
    """What is summed where `predicate` holds. In rows for which any of `lost` holds the sum is NaN."""

    predicate: Node
    factors: tuple[Node, ...]
    lost: tuple[Node, ...] = ()

    @property
    def parts(self) -> tuple[Node, ...]:
        return self.predicate, *self.factors

    def of_row(self, reduced: Node) -> Node:
        for predicate in self.lost:
            reduced = where(predicate, const(math.nan, reduced.dtype), reduced)
        return reduced


def unfilled(
    predicate: Node, factors: tuple[Node, ...], stream: Axis, is_positive: Callable[[Node], bool] = lambda _: False
) -> Unfilled:
    """The same sum without the terms that fills make 0. is_positive: of a row's own values."""
    found, tried = Unfilled(predicate, factors), {TRUE}
    while sites := [p for p in _masks(found, stream) if p not in tried]:
        tried.add(sites[0])
        found = _without(found, sites[0], stream, is_positive)
    return found


def _without(held: Unfilled, p: Node, stream: Axis, is_positive: Callable[[Node], bool]) -> Unfilled:
    """Without the terms for which p does not hold, if those are 0, or all of a row NaN."""
    fill = _Fill(p, stream, is_positive)
    if not _vanish(fill.of(held.parts)):
        return held
    at_lost = _Fill(p, stream, is_positive, is_lost=True).of(held.parts)
    lost = () if not fill.rows or _vanish(at_lost) else tuple(fill.rows)
    if not set(lost) <= set(held.lost) and (held.predicate is not TRUE or not any(map(_is_nan, at_lost))):
        return held
    predicate, *factors = (transform(part, lambda n: _kept(n, p)) for part in held.parts)
    return Unfilled(apply("and", predicate, p), tuple(factors), tuple(dict.fromkeys((*held.lost, *lost))))


def _vanish(parts: list[Node]) -> bool:
    """Whether terms are none, or 0: 0 · -inf is neither."""
    numbers = [part.value for part in parts[1:] if isinstance(part, Const)]
    return parts[0] is FALSE or (0 in numbers and all(map(math.isfinite, numbers)))


def _masks(held: Unfilled, stream: Axis) -> Iterator[Node]:
    """What chooses between a value and a number, outside reductions: positions and what memory holds, no scores."""
    todo = list(held.parts)
    while todo:
        node = todo.pop()
        site = _site(node)
        if site and stream in site[0].free and not any(isinstance(n, (Reduce, Ref)) for n in walk(site[0])):
            yield site[0]
        todo.extend(node.children if not isinstance(node, Reduce) else ())


def _site(node: Node) -> tuple[Node, Node, Const] | None:
    """where(p, s, c)  →  p, s, c;  p as a number  →  p, 1, 0;  a mask that is added  →  mask != -inf, mask, -inf"""
    if not node.dtype.is_floating_point:
        return None
    match node:
        case Apply(op="cast", args=(p,)) if is_truth_cast(node):
            return p, const(1.0, node.dtype), const(0.0, node.dtype)
        case Where(predicate=p, then=kept, other=Const() as number):
            return p, kept, number
        case Where(predicate=p, then=Const() as number, other=kept):
            return apply("not", p), kept, number
        case Load() if node.tensor.masks == -math.inf:
            number = const(-math.inf, node.dtype)
            return apply("ne", node, number), node, number
    return None


def _kept(node: Node, p: Node) -> Node:
    """What stands where p holds."""
    if isinstance(node, Apply) and node.op == "add" and any(map(_is_zero, node.args)):
        return next((a for a in node.args if not _is_zero(a)), node)
    site = _site(node)
    return site[1] if site and site[0] is p else node


@dataclass(frozen=True)
class _Fill:
    """What stands where p does not hold: NaN is what is lost, if `is_lost`. `rows` say where a row loses it."""

    p: Node
    stream: Axis
    is_positive: Callable[[Node], bool]
    is_lost: bool = False
    rows: dict[Node, None] = field(default_factory=dict)

    def of(self, parts: tuple[Node, ...]) -> list[Node]:
        return [transform(part, self._filled) for part in parts]

    def _filled(self, node: Node) -> Node:
        site = _site(node)
        if site and site[0] is self.p:
            return site[2]
        return self._simplified(node) if isinstance(node, Apply) and node.op in ARITHMETIC else node

    def _simplified(self, node: Apply) -> Node:
        if not node.dtype.is_floating_point or all(isinstance(a, Const) for a in node.args):
            return node
        if any(map(_is_nan, node.args)):
            return const(math.nan, node.dtype)
        match node:
            case Apply(op="add", args=(Const(value=low), x) | (x, Const(value=low))) if math.isinf(low):
                return self._unless(apply("eq", x, const(-low, x.dtype)), x, const(low, node.dtype))
            case Apply(op="sub", args=(Const(value=low), x)) if math.isinf(low):
                return self._unless(apply("eq", x, const(low, x.dtype)), x, const(low, node.dtype))
            case Apply(op="mul", args=(Const(value=0), x) | (x, Const(value=0))) | Apply(
                op="div", args=(Const(value=0), x)
            ):
                return self._unless(apply("isnan", node), x, const(0.0, node.dtype))
            case Apply(op="maximum", args=(x, Const(value=0)) | (Const(value=0), x)) if _is_negative(x):
                return const(0.0, node.dtype)
        return node

    def _unless(self, lost: Node, x: Node, value: Const) -> Node:
        """A value beside x, which is taken to be a number where it is no row's own, or differs along it."""
        if not has_refs(x) or self.is_positive(x):
            return value
        if self.stream in x.free:
            return x
        self.rows[lost] = None
        return const(math.nan, value.dtype) if self.is_lost else value


def _is_negative(node: Node) -> bool:
    """0 - exp(x), at most 0."""
    match node:
        case Apply(op="sub", args=(Const(value=0), Apply(op="exp"))) | Apply(op="neg", args=(Apply(op="exp"),)):
            return True
    return False


def _is_zero(node: Node) -> bool:
    return isinstance(node, Const) and node.value == 0


def _is_nan(node: Node) -> bool:
    return isinstance(node, Const) and node.value != node.value
