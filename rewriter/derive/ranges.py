"""The interval that a value lies in, from its operations alone, NaN aside."""

from __future__ import annotations

import math

import torch

from rewriter.ir import Apply, Const, Node, Where

Range = tuple[float, float]
ANYTHING: Range = (-math.inf, math.inf)
BOUNDED: dict[str, Range] = {
    "tanh": (-1.0, 1.0),
    "sin": (-1.0, 1.0),
    "cos": (-1.0, 1.0),
    "erf": (-1.0, 1.0),
    "sign": (-1.0, 1.0),
    "sigmoid": (0.0, 1.0),
}


def range_of(node: Node) -> Range:
    """tanh(x) * 30 → (-30, 30);  clamp(x, 0, 8) → (0, 8);  where(p, sin(x), 2) → (-1, 2)"""
    match node:
        case Const():
            return (float(node.value), float(node.value))
        case Where(then=a, other=b):
            return _hull(range_of(a), range_of(b))
        case Apply(op=op) if op in BOUNDED:
            return BOUNDED[op]
        case Apply(op="cast", args=(x,)):
            return (0.0, 1.0) if x.dtype is torch.bool else range_of(x)
        case Apply(args=args):
            return _applied(node.op, [range_of(a) for a in args])
    return ANYTHING


def _applied(op: str, ranges: list[Range]) -> Range:
    match op, ranges:
        case "add", [(a, b), (c, d)]:
            return (a + c, b + d)
        case "sub", [(a, b), (c, d)]:
            return (a - d, b - c)
        case "neg", [(a, b)]:
            return (-b, -a)
        case "mul", [(a, b), (c, d)]:
            return _ends([_times(x, y) for x in (a, b) for y in (c, d)])
        case "div", [(a, b), (c, d)] if c == d and c not in (0, math.inf, -math.inf):
            return _ends([a / c, b / c])
        case "maximum", [(a, b), (c, d)]:
            return (max(a, c), max(b, d))
        case "minimum", [(a, b), (c, d)]:
            return (min(a, c), min(b, d))
        case "exp", [(a, b)] if b < 700:
            return (math.exp(a), math.exp(b))
        case "exp", [_]:
            return (0.0, math.inf)
    return ANYTHING


def _times(x: float, y: float) -> float:
    return 0.0 if 0 in (x, y) else x * y


def _ends(values: list[float]) -> Range:
    return (min(values), max(values))


def _hull(a: Range, b: Range) -> Range:
    return (min(a[0], b[0]), max(a[1], b[1]))
