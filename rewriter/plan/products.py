"""Which sums of a kernel are matrix products, in which unit, and in which type their operands are."""

from __future__ import annotations

import torch

from rewriter.derive import Definition
from rewriter.ir import Load, Node, walk
from rewriter.plan.kernel import KernelPlan


def weighted_values(plan: KernelPlan, definition: Definition) -> Node | None:
    """The values v of sum_n weight[m, n] · v[n, e] where that is a matrix product: v does not depend on rows."""
    values = [f for f in definition.rest if any(a in plan.features for a in f.free)]
    if len(values) != 1 or plan.steps or not set(plan.rows) & set(definition.axes):
        return None
    lanes = [a for a in plan.tile_axes if a in values[0].free]
    features = [a for a in lanes if a in plan.features]
    return values[0] if len(features) == 1 and lanes == [definition.stream, *features] else None


def operand_dtype(plan: KernelPlan, *operands: Node) -> torch.dtype:
    """The widest floating type that the operands of one product are stored in."""
    floats = [n.dtype for n in walk(*operands) if isinstance(n, Load) and n.dtype.is_floating_point]
    return max(floats, key=lambda d: d.itemsize, default=plan.dtype)
