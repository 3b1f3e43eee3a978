"""Where eager's rounding between operations must be kept."""

from __future__ import annotations

import math

import torch

from rewriter.ir import Apply, Const, Load, Node, Reduce, Tensor, apply, transform, walk

LARGE = 2.0**13  # from here on fp16 rounds a sum with a score to multiples of 8 or more


def with_absorption(node: Node) -> Node:
    """Applies `absorbing` everywhere."""
    return transform(node, absorbing)


def with_absorption_inside(node: Node) -> Node:
    """The same in what is reduced alone: what follows results position by position is written, and rounded there."""
    return transform(node, lambda n: with_absorption(n) if isinstance(n, Reduce) else n)


def absorbing(node: Node) -> Node:
    """s + fill  →  round16(s + fill)  in fp16, where the fill may be as large as -65504

    Rounding between operations may be skipped, but not here: eager's fp16 swallows s, so that a row filled throughout
    has equal weights, where fp32 registers would keep s apart. (In fp32 and bf16 a least finite number swallows s
    anyway.) A row's own maximum or mean is the same all along the row, so that there is nothing to keep apart.
    """
    if not (isinstance(node, Apply) and node.op in ("add", "sub") and node.dtype is torch.float16):
        return node
    pairs = (node.args, node.args[::-1])
    return apply("round16", node) if any(_is_fill(a) and not _is_of_rows(b, a) for a, b in pairs) else node


def _is_of_rows(value: Node, fill: Node) -> bool:
    """Whether a value is made of reductions of the fill itself: it is the same along what they go over."""
    reduced = walk(*(n for n in walk(value) if isinstance(n, Reduce)))
    return value.free < fill.free and _tensors(fill) <= _tensors(*reduced)


def _tensors(*nodes: Node) -> set[Tensor]:
    return {n.tensor for n in walk(*nodes) if isinstance(n, Load)}


def _is_fill(node: Node) -> bool:
    """A mask or bias added to scores: no reduction in it, and possibly large."""
    return not any(isinstance(n, Reduce) for n in walk(node)) and has_fill(node, LARGE)


def has_fill(node: Node, large: float) -> bool:
    """Whether a value holds a constant from `large` on or a tensor of biases, outside contractions and indices."""
    if isinstance(node, Const):
        return math.isfinite(node.value) and abs(node.value) >= large
    if isinstance(node, Load):
        return node.dtype.is_floating_point and len(node.free) >= 2
    return not isinstance(node, Reduce) and any(has_fill(c, large) for c in node.children)
