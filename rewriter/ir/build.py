"""Constructors that keep values in normal form: integers as polynomials, constants folded, trivial choices taken.

No rule here changes a floating-point result, but for the sign of a zero.
"""

from __future__ import annotations

import math

import torch

from rewriter.ir import integer
from rewriter.ir.nodes import FALSE, TRUE, Apply, Axis, Const, Index, Node, Where, reduce_over
from rewriter.ir.ops import OPS

_FLIP = {"gt": "lt", "ge": "le"}


def const(value: int | float | bool, dtype: torch.dtype | None = None) -> Const:
    """A constant; its dtype follows Python's type where none is given (float: fp32)."""
    if dtype is None:
        dtype = {bool: torch.bool, int: torch.int64, float: torch.float32}[type(value)]
    if dtype.is_floating_point:
        value = float(value)
    elif dtype is torch.bool:
        value = bool(value)
    else:
        value = int(value)
    return Const(value, dtype)


def is_int(node: Node) -> bool:
    return not (node.dtype.is_floating_point or node.dtype is torch.bool)


def apply(op: str, *args: Node, dtype: torch.dtype | None = None) -> Node:
    """`Apply` in normal form. `dtype` defaults to what torch's promotion of the arguments gives."""
    dtype = dtype or result_dtype(op, args)
    if all(isinstance(a, Const) for a in args) and op != "cast":
        return _folded(op, args, dtype)
    if (dtype.is_floating_point or dtype is torch.bool) and (chosen := _of_choices(op, args, dtype)):
        return chosen
    if not (dtype.is_floating_point or dtype is torch.bool) and all(is_int(a) for a in args):
        return _integer(op, args, dtype)
    if dtype is torch.bool:
        return _logical(op, args)
    if op == "cast":
        return _cast(args[0], dtype)
    return _unscaled(op, args, dtype) or Apply(op, args, dtype)


def _unscaled(op: str, args: tuple[Node, ...], dtype: torch.dtype) -> Node | None:
    """x * 1, 1 * x and x / 1  →  x"""
    match op, args:
        case ("mul", (x, Const(value=1)) | (Const(value=1), x)) | ("div", (x, Const(value=1))) if x.dtype is dtype:
            return x
    return None


def result_dtype(op: str, args: tuple[Node, ...]) -> torch.dtype:
    kind = OPS[op].kind
    if kind == "bool":
        return torch.bool
    dtype = args[0].dtype
    for arg in args[1:]:
        dtype = torch.promote_types(dtype, arg.dtype)
    return torch.float32 if kind == "float" and not dtype.is_floating_point else dtype


def _folded(op: str, args: tuple[Node, ...], dtype: torch.dtype) -> Node:
    wide = torch.float64 if dtype.is_floating_point else None
    values = [torch.tensor(a.value, dtype=wide if wide and a.dtype.is_floating_point else a.dtype) for a in args]
    return const(OPS[op].torch(*values).item(), dtype)


def _of_choices(op: str, args: tuple[Node, ...], dtype: torch.dtype) -> Node | None:
    """log(where(p, 1, 0))  →  where(p, 0, -inf): of choices between two numbers, and of numbers, where that is one, too"""
    predicates = dict.fromkeys(p for a in args if (p := _choice(a)[0]) is not TRUE)
    if op == "cast" and args[0].dtype is torch.bool or not predicates or not all(_choice(a)[1] for a in args):
        return None
    first, second = (*predicates, TRUE)[:2]

    def row(of_first: bool) -> Node:
        return where(second, *(_taken(op, args, {first: of_first, second: b}, dtype) for b in (True, False)))

    made = where(first, row(True), row(False))
    return made if second is TRUE or dtype is torch.bool or _choice(made)[1] else None


def _taken(op: str, args: tuple[Node, ...], at: dict[Node, bool], dtype: torch.dtype) -> Node:
    """What it is of the numbers that are taken where predicates hold or do not: beyond its dtype's an infinity."""
    made = apply(op, *(then if p is TRUE or at[p] else other for p, then, other in map(_choice, args)), dtype=dtype)
    if not dtype.is_floating_point:
        return made
    held = torch.tensor(made.value, dtype=torch.float64).to(dtype).item()
    return const(held if math.isinf(held) else made.value or 0.0, dtype)  # not -0.0


def _choice(node: Node) -> tuple[Node, Const | None, Const | None]:
    """(p, a, b) of where(p, a, b), of p as a number (p, 1, 0), of a number (TRUE, a, a); (TRUE, None, None) of others"""
    match node:
        case Const():
            return TRUE, node, node
        case Where(predicate=p, then=Const() as a, other=Const() as b):
            return p, a, b
        case Apply(op="cast", args=(p,)) if p.dtype is torch.bool:
            return p, const(1, node.dtype), const(0, node.dtype)
    return TRUE, None, None


def _integer(op: str, args: tuple[Node, ...], dtype: torch.dtype) -> Node:
    match op:
        case "add" | "sub" | "mul" | "neg":
            return integer.from_poly(integer.to_poly(Apply(op, args, dtype)))
        case "floordiv":
            return integer.floordiv(*args)
        case "mod":
            return integer.mod(*args)
        case "minimum" | "maximum":
            return integer.extremum(op, *args)
        case "cast":
            return args[0]
    return Apply(op, args, dtype)


def _logical(op: str, args: tuple[Node, ...]) -> Node:
    if op in _FLIP:
        return _logical(_FLIP[op], args[::-1])
    if op in ("lt", "le", "eq", "ne") and all(map(is_int, args)):
        return _compared(op, *args)
    if op in ("eq", "ne") and any(a.dtype is torch.bool for a in args):
        return _equated(op, *args)
    if op in ("and", "or"):
        return _junction(op, *args)
    if op == "not" and isinstance(args[0], Apply):
        return _negated(args[0])
    if op == "cast":
        return args[0] if args[0].dtype is torch.bool else _cast(args[0], torch.bool)
    return Apply(op, args, torch.bool)


def _compared(op: str, a: Node, b: Node) -> Node:
    """Comparisons of integers that hold (or fail) for every index become constants."""
    if op == "ne":
        return _negated(_compared("eq", a, b))
    negation = {"lt": ("le", b, a), "le": ("lt", b, a)}
    if integer.proves(op, a, b):
        return TRUE
    if op in negation and integer.proves(*negation[op]):
        return FALSE
    if op == "eq" and (integer.proves("lt", a, b) or integer.proves("lt", b, a)):
        return FALSE
    return Apply(op, (a, b), torch.bool)


def _equated(op: str, a: Node, b: Node) -> Node:
    """p == 0  →  not p;  p != 0  →  p, and the like for 1"""
    truth, other = (b, a) if isinstance(a, Const) else (a, b)
    if truth.dtype is not torch.bool or not isinstance(other, Const) or other.value not in (0, 1):
        return Apply(op, (a, b), torch.bool)
    return truth if (op == "eq") == bool(other.value) else _logical("not", (truth,))


def _junction(op: str, a: Node, b: Node) -> Node:
    neutral, absorbing = (TRUE, FALSE) if op == "and" else (FALSE, TRUE)
    if a is b or b is neutral:
        return a
    if a is neutral:
        return b
    if absorbing in (a, b):
        return absorbing
    return Apply(op, (a, b), torch.bool)


def _negated(node: Node) -> Node:
    if isinstance(node, Const):
        return const(not node.value, torch.bool)
    if isinstance(node, Apply) and node.op == "not":
        return node.args[0]
    if isinstance(node, Apply) and node.op in ("lt", "le") and all(map(is_int, node.args)):
        return _compared("le" if node.op == "lt" else "lt", node.args[1], node.args[0])
    return Apply("not", (node,), torch.bool)


def _cast(node: Node, dtype: torch.dtype) -> Node:
    if node.dtype is dtype:
        return node
    if isinstance(node, Const):
        return const(node.value, dtype)
    return Apply("cast", (node,), dtype)


def cast(node: Node, dtype: torch.dtype) -> Node:
    """`node` as `dtype`; integer widths are not distinguished (indices are 64-bit)."""
    return apply("cast", node, dtype=dtype)


def where(predicate: Node, then: Node, other: Node) -> Node:
    """A lazy choice, taken at once where the predicate is a constant."""
    if then is other or predicate is TRUE:
        return then
    if predicate is FALSE:
        return other
    if other is FALSE:
        return apply("and", predicate, then)
    if then is TRUE:
        return apply("or", predicate, other)
    if then is FALSE:
        return apply("and", apply("not", predicate), other)
    if other is TRUE:
        return apply("or", apply("not", predicate), then)
    if isinstance(predicate, Apply) and predicate.op == "not":
        return where(predicate.args[0], other, then)
    return _joined(predicate, then, other) or Where(predicate, then, other)


def _joined(predicate: Node, then: Node, other: Node) -> Node | None:
    """where(p, where(q, 1, 0), 0)  →  where(p & q, 1, 0), and the like: of two numbers one choice"""
    q, a, b = _choice(other if isinstance(then, Const) else then)
    if a is b or not (isinstance(then, Const) or isinstance(other, Const)):
        return None
    if other is b:
        return where(apply("and", predicate, q), a, b)
    if other is a:
        return where(apply("or", apply("not", predicate), q), a, b)
    if then is a:
        return where(apply("or", predicate, q), a, b)
    if then is b:
        return where(apply("and", apply("not", predicate), q), a, b)
    return None


def reduce(op: str, axes: tuple[Axis, ...], body: Node, predicate: Node = TRUE) -> Node:
    """⊕ over `axes`; a reduction over one element is that element."""
    for axis in axes:
        if axis.extent is Const(1) and predicate is TRUE:
            from rewriter.ir.nodes import substitute

            body = substitute(body, {axis: Const(0)})
    axes = tuple(a for a in axes if not (a.extent is Const(1) and predicate is TRUE))
    return reduce_over(op, axes, body, predicate) if axes else body


def index(axis: Axis) -> Node:
    """The position along an axis; an axis of one element is always at 0."""
    return Const(0) if axis.extent is Const(1) else Index(axis)
