"""einx's operations element by element, as broadcasting: the library itself asks for sizes as numbers.

einx.multiply("b n h, b h n d -> b h n d", gate, out)  →  gate.permute(0, 2, 1)[..., None] * out
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rewriter.trace.numbers import is_symbolic

ELEMENTWISE = {
    name: getattr(torch, name)
    for name in ("add", "subtract", "multiply", "divide", "true_divide", "where", "less", "less_equal", "greater")
}
ELEMENTWISE |= {"greater_equal": torch.greater_equal, "not_equal": torch.not_equal, "equal": torch.eq}
ELEMENTWISE |= {name: getattr(torch, name) for name in ("maximum", "minimum", "logical_and", "logical_or", "logaddexp")}


def by_named_axes() -> Iterator[tuple[Any, str, Callable]]:
    """(owner, name, what it is while tracing), where a program has imported einx"""
    owner = sys.modules.get("einx")
    for name, op in ELEMENTWISE.items() if owner else ():
        if hasattr(owner, name):
            yield owner, name, _broadcast(getattr(owner, name), op)


def _broadcast(original: Callable, op: Callable) -> Callable:
    @functools.wraps(original)
    def traced(description: str, *operands: Any, **options: Any) -> Any:
        sizes = [n for t in operands if isinstance(t, Tensor) for n in t.shape]
        aligned = None if options or not any(map(is_symbolic, sizes)) else _aligned(description, operands)
        return original(description, *operands, **options) if aligned is None else op(*aligned)

    return traced


def _aligned(description: str, operands: tuple) -> list | None:
    """The operands over the dimensions of the result; None where a description says more than their order."""
    given, arrow, out = description.partition("->")
    inputs = [_axes(text, t) for text, t in zip(given.split(","), operands)]
    if None in inputs or len(inputs) != len(operands) or given.count(",") != len(operands) - 1:
        return None
    longest = max(inputs, key=len)
    rest = sum(isinstance(axis, int) for axis in longest)
    result = _named(out, rest) if arrow else longest
    if result is None or not all({a for a in axes if a != "1"} <= set(result) for axes in inputs):
        return None
    return [_laid(t, axes, result) for t, axes in zip(operands, inputs)]


def _axes(text: str, operand: Any) -> list | None:
    """The axis of each dimension; numbers for those of an ellipsis."""
    rank = operand.dim() if isinstance(operand, Tensor) else 0
    axes = _named(text, rank - len([a for a in text.split() if a != "..."]))
    return axes if axes is not None and len(axes) == rank else None


def _named(text: str, rest: int) -> list | None:
    out: list = []
    for axis in text.split():
        if not re.fullmatch(r"[A-Za-z_]\w*|1|\.\.\.", axis):
            return None
        out += range(rest) if axis == "..." else [axis]
    names = [a for a in out if a != "1"]
    return out if len(set(names)) == len(names) else None


def _laid(operand: Any, axes: list, result: list) -> Any:
    """x[b, n, 1] over (b, h, n)  →  x[:, None, :]"""
    if not isinstance(operand, Tensor):
        return operand
    kept = [d for d, a in enumerate(axes) if a != "1"]
    for dim in reversed(range(len(axes))):
        operand = operand if dim in kept else operand.squeeze(dim)
    names = [axes[d] for d in kept]
    present = [a for a in result if a in names]
    operand = operand.permute([names.index(a) for a in present])
    for dim, axis in enumerate(result):
        operand = operand if axis in present else operand.unsqueeze(dim)
    return operand
