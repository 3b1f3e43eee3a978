"""Whether the weights of a product fit 16 bits."""

from __future__ import annotations

from rewriter.derive import Definition
from rewriter.derive.ranges import range_of
from rewriter.ir import Apply, Load, Node
from rewriter.plan.products import Weighed

LARGEST_WEIGHT = 10_000  # so that a few of them, multiplied by numbers near 1, stay below the 65504 of fp16


def fits_half(definition: Definition, product: Weighed) -> bool:
    """Whether no weight of a product overflows 16 bits."""
    return _is_at_most_one(definition) or _are_stored(definition, product.weights)


def _are_stored(definition: Definition, weights: tuple[Node, ...]) -> bool:
    """Whether the weights are a tensor as it is: of 16 bits they fit 16 bits."""
    return definition.shift is None and len(weights) == 1 and isinstance(weights[0], Load)


def _is_at_most_one(definition: Definition) -> bool:
    """Whether weights are bounded: exponentials below a running maximum, or values of a bounded function."""
    weights = [f for f in definition.rest if not any(isinstance(n, Load) for n in _factors(f))]
    if definition.shift and definition.shift.mass:
        return False
    return bool(definition.shift or weights) and all(is_bounded(f) for f in weights)


def _factors(node: Node) -> list[Node]:
    """What is multiplied in a value read from memory; nothing of what is computed otherwise."""
    if isinstance(node, Apply) and node.op in ("mul", "cast"):
        return [n for a in node.args for n in _factors(a)]
    return [node]


def is_bounded(node: Node) -> bool:
    """Whether a weight fits 16 bits."""
    return max(map(abs, range_of(node))) <= LARGEST_WEIGHT
