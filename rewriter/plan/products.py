"""Which sums of a kernel are matrix products, in which unit, and in which type their operands are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch

from rewriter.derive import Definition
from rewriter.derive.factors import as_product, quotient
from rewriter.ir import TRUE, Axis, Load, Node, apply, walk
from rewriter.plan.kernel import KernelPlan, Loop
from rewriter.plan.parts import is_weighted


@dataclass(frozen=True)
class Weighed:
    """sum_n weights[m, n] · values[n, e] as a matrix product; `inside` a loop, one for each of its positions, whose
    weights are `weights` times `own`, where `predicate` holds.
    """

    values: Node
    weights: tuple[Node, ...]
    inside: Loop | None = None
    own: Node | None = None
    predicate: Node = TRUE


def weighed(plan: KernelPlan, definition: Definition) -> Weighed | None:
    """How a sum is a matrix product, if it is one: values do not depend on rows."""
    if definition.op != "sum" or plan.steps or not set(plan.rows) & set(definition.axes):
        return None
    found = _split(plan, definition, definition.rest)
    if found is None:
        return None
    values, weights = found
    inside = next((r for r in plan.loops if r.node is values), None)
    if inside is None or not is_weighted(values):
        return Weighed(values, weights) if _is_matrix(plan, definition, values) else None
    product = as_product(inside.body)
    found = _split(plan, definition, product.over)
    if found is None or not _is_matrix(plan, definition, found[0], inside.axis):
        return None
    own = quotient(list(found[1]), product.under)
    return Weighed(found[0], weights, inside, own, apply("and", inside.predicate, product.predicate))


def _split(plan: KernelPlan, definition: Definition, factors: Iterable[Node]) -> tuple[Node, tuple[Node, ...]] | None:
    """(the one factor that has features, the others)"""
    values = [f for f in factors if any(a in plan.features and a in definition.axes for a in f.free)]
    return (values[0], tuple(f for f in factors if f is not values[0])) if len(values) == 1 else None


def _is_matrix(plan: KernelPlan, definition: Definition, values: Node, turn: Axis | None = None) -> bool:
    """Whether values are a tile of the stream and one feature axis, at each turn of a loop."""
    lanes = [a for a in plan.tile_axes if a in values.free and a is not turn]
    features = [a for a in lanes if a in plan.features]
    return len(features) == 1 and lanes == [definition.stream, *features]


def operand_dtype(plan: KernelPlan, *operands: Node) -> torch.dtype:
    """The floating type that holds all that the operands of one product are stored in: fp32 for fp16 and bf16."""
    floats = [n.dtype for n in walk(*operands) if isinstance(n, Load) and n.dtype.is_floating_point]
    return reduce(torch.promote_types, floats) if floats else plan.dtype
