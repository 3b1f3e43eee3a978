"""Rules that bring a program into the form deriving expects; none changes a value."""

from __future__ import annotations

from rewriter.derive.factors import as_product
from rewriter.derive.splits import split_concatenations
from rewriter.ir import (
    FALSE,
    TRUE,
    Apply,
    Load,
    Node,
    Reduce,
    apply,
    open_reduce,
    reduce,
    transform,
    walk,
)


def normalise(node: Node) -> Node:
    """Splits concatenations and decides NaN by the row."""
    return transform(split_concatenations(node), nan_of_weights)


def nan_of_weights(node: Node) -> Node:
    """isnan(e / sum e)  →  isnan(sum e)  for e = exp(...): a weight is NaN exactly where its row's sum is
    isinf(e / sum e)  →  False"""
    if not (isinstance(node, Apply) and node.op in ("isnan", "isinf")):
        return node
    product = as_product(node.args[0])
    if len(product.over) != 1 or len(product.under) != 1:
        return node
    weight, total = product.over[0], product.under[0]
    if not (isinstance(weight, Apply) and weight.op == "exp" and isinstance(total, Reduce) and total.op == "sum"):
        return node
    if not _sums(total, weight):
        return node
    return apply("isnan", total) if node.op == "isnan" else FALSE


def _sums(total: Reduce, weight: Node) -> bool:
    """Whether `total` is the sum of `weight` over one of its axes."""
    return any(reduce("sum", (axis,), weight) is total for axis in weight.free)


def is_bilinear(node: Node) -> bool:
    """A chain of matrix products, which eager reassociates better than a fused kernel would compute."""
    reduces = [n for n in walk(node) if isinstance(n, Reduce)]
    sums = all(n.op == "sum" and _is_linear(n.body) and _can_be_last(n) for n in reduces)
    return bool(reduces) and sums and _is_linear(node)


def _is_linear(body: Node) -> bool:
    """A product of sums, of what memory holds, and of numbers that no two axes give."""
    product = as_product(body)
    factors = [f for f in product.over if not isinstance(f, Reduce)] + list(product.under)
    return product.predicate is TRUE and all(map(_is_plain, factors))


def _is_plain(factor: Node) -> bool:
    return isinstance(factor, Load) or (
        len(factor.free) < 2 and not any(isinstance(n, (Load, Reduce)) for n in walk(factor))
    )


def _can_be_last(outer: Reduce) -> bool:
    """Whether every sum that is summed again can be left for later.

    sum n: (sum d: q[m, d] k[n, d]) v[n, e]  →  sum d: q[m, d] (sum n: k[n, d] v[n, e]), but not where another factor
    depends on m and n: (sum d: q[m, d] k[n, d])² v[n, e]
    """
    axes, _, body = open_reduce(outer)
    summed = frozenset(axes)
    factors = [f for f in (*as_product(body).over, *as_product(body).under) if f.free & summed]
    for k, inner in enumerate(factors):
        if not isinstance(inner, Reduce):
            continue
        along = [f.free for f in as_product(open_reduce(inner)[2]).over if f.free & summed]
        rows = inner.free - frozenset().union(*along)
        if any(f.free & rows for f in (*factors[:k], *factors[k + 1 :])):
            return False
    return True
