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
    """A chain of plain matrix products, which eager reassociates better than a fused kernel would compute."""
    reduces = [n for n in walk(node) if isinstance(n, Reduce)]
    return (
        bool(reduces) and all(n.op == "sum" and _is_product_of_loads(n) for n in reduces) and _is_product_of_loads(node)
    )


def _is_product_of_loads(node: Node) -> bool:
    body = node.body if isinstance(node, Reduce) else node
    product = as_product(body)
    return product.predicate is TRUE and all(isinstance(f, (Load, Const, Reduce)) for f in product.over + product.under)
