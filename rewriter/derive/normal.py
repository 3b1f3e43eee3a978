"""Rules that bring a program into the form deriving expects; none changes a value."""

from __future__ import annotations

from rewriter.derive.factors import as_product
from rewriter.derive.splits import split_concatenations
from rewriter.ir import (
    FALSE,
    TRUE,
    Apply,
    Const,
    Load,
    Node,
    Reduce,
    apply,
    open_reduce,
    reduce,
    substitute,
    transform,
    walk,
)
from rewriter.ir.ops import MONOIDS

UNROLL = 16  # elements of a reduction that is written out


def normalise(node: Node) -> Node:
    """Splits concatenations, unrolls short reductions that are no contraction, decides NaN by the row."""
    return transform(transform(split_concatenations(node), unroll_short), nan_of_weights)


def unroll_short(node: Node) -> Node:
    """any_{k<3} (i - j == o[k])  →  (i - j == o[0]) | (i - j == o[1]) | (i - j == o[2])"""
    if not isinstance(node, Reduce) or _is_contraction(node):
        return node
    if (
        len(node.axes) != 1
        or not isinstance(node.axes[0].extent, Const)
        or node.axes[0].extent.value > UNROLL
    ):
        return node
    if any(isinstance(n, Reduce) for n in walk(node.body)):
        return node
    (axis,), predicate, body = open_reduce(node)
    terms = [substitute(body, {axis: Const(k)}) for k in range(int(axis.extent.value))]
    if predicate is not TRUE:
        return node
    out = terms[0]
    for term in terms[1:]:
        out = apply(MONOIDS[node.op].combine, out, term)
    return out


def _is_contraction(node: Reduce) -> bool:
    """A sum of products of loads: it becomes a matrix product."""
    return node.op == "sum" and any(isinstance(n, Load) for n in walk(node.body))


def nan_of_weights(node: Node) -> Node:
    """isnan(e / sum e)  →  isnan(sum e)  for e = exp(...): a weight is NaN exactly where its row's sum is
    isinf(e / sum e)  →  False"""
    if not (isinstance(node, Apply) and node.op in ("isnan", "isinf")):
        return node
    product = as_product(node.args[0])
    if len(product.over) != 1 or len(product.under) != 1:
        return node
    weight, total = product.over[0], product.under[0]
    if not (
        isinstance(weight, Apply) and weight.op == "exp" and isinstance(total, Reduce) and total.op == "sum"
    ):
        return node
    if not _sums(total, weight):
        return node
    return apply("isnan", total) if node.op == "isnan" else FALSE


def _sums(total: Reduce, weight: Node) -> bool:
    """Whether `total` is the sum of `weight` over one of its axes."""
    return any(reduce("sum", (axis,), weight) is total for axis in weight.free)


def is_bilinear(node: Node) -> bool:
    """A chain of plain matrix products, which eager reassociates better than a fused kernel would compute."""
    reduces = [n for n in walk(node) if isinstance(n, Reduce)]
    return bool(reduces) and all(_is_product_of_loads(n) for n in reduces) and _is_product_of_loads(node)


def _is_product_of_loads(node: Node) -> bool:
    body = node.body if isinstance(node, Reduce) else node
    product = as_product(body)
    return product.predicate is TRUE and all(
        isinstance(f, (Load, Const, Reduce)) for f in product.over + product.under
    )
