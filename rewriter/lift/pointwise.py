"""Pointwise ATen ops: mostly a table from their name to ours."""

from __future__ import annotations

import torch

from rewriter.ir import Const, Node, apply, cast, const, where
from rewriter.ir.ops import OPS
from rewriter.lift.registry import Context, lifts, operand
from rewriter.lift.values import Lifted, NotLiftable, broadcast_at, fresh_axes, positions

SAME_NAME = (
    "neg abs sign exp exp2 log log2 log1p expm1 sqrt rsqrt sin cos tanh sigmoid erf floor ceil round isinf isnan"
)
ALIASES = {
    "negative": "neg",
    "absolute": "abs",
    "sgn": "sign",
    "special_exp2": "exp2",
    "special_log1p": "log1p",
    "special_expm1": "expm1",
    "special_expit": "sigmoid",
    "special_erf": "erf",
    "special_round": "round",
}
BINARY = {
    "mul": "mul",
    "multiply": "mul",
    "maximum": "maximum",
    "minimum": "minimum",
    "max.other": "maximum",
    "min.other": "minimum",
    "pow": "pow",
    "remainder": "mod",
    "fmod": "fmod",
    "floor_divide": "floordiv",
    "eq": "eq",
    "ne": "ne",
    "not_equal": "ne",
    "lt": "lt",
    "less": "lt",
    "le": "le",
    "less_equal": "le",
    "gt": "gt",
    "greater": "gt",
    "ge": "ge",
    "greater_equal": "ge",
    "logical_and": "and",
    "logical_or": "or",
    "logical_xor": "xor",
    "__and__": "bitand",
    "__or__": "bitor",
    "__xor__": "bitxor",
    "bitwise_and": "bitand",
    "bitwise_or": "bitor",
    "bitwise_xor": "bitxor",
}


def pointwise(ctx: Context, function, *operands) -> Lifted:
    """Applies `function` to the scalars of broadcast operands, over the traced result's shape."""
    axes = fresh_axes(ctx.shape)
    like = next((o.body.dtype for o in operands if isinstance(o, Lifted)), None)
    at = [broadcast_at(operand(o, like), positions(axes)) for o in operands]
    result = function(*at)
    return Lifted(axes, result if result.dtype is ctx.dtype else cast(result, ctx.dtype))


def _unary(name: str):
    return lambda ctx, x: pointwise(ctx, lambda a: apply(name, _floating(name, a)), x)


def _floating(name: str, a: Node) -> Node:
    """Transcendental functions of integers are those of their float."""
    return cast(a, torch.float32) if OPS[name].kind == "float" and not a.dtype.is_floating_point else a


def _binary(name: str):
    def rule(ctx: Context, a, b) -> Lifted:
        return pointwise(ctx, lambda x, y: _apply_binary(ctx, name, x, y), a, b)

    return rule


def _apply_binary(ctx: Context, name: str, x: Node, y: Node) -> Node:
    if name in ("and", "or", "xor"):
        return apply(name, truth(x), truth(y))
    if name in _OF_BITS and ctx.dtype is torch.bool:
        return apply(name.removeprefix("bit"), x, y)
    if ctx.dtype.is_floating_point:
        x, y = (n if n.dtype.is_floating_point else cast(n, ctx.dtype) for n in (x, y))
    if name == "pow":
        return power(x, y)
    return _rounded_towards_zero(x, y) if name == "truncdiv" and ctx.dtype.is_floating_point else apply(name, x, y)


_OF_BITS = ("bitand", "bitor", "bitxor")


def power(x: Node, y: Node) -> Node:
    """x³ → x·x·x, √x, 1 / x, 2^y ..."""
    exponent = y.value if isinstance(y, Const) else None
    if isinstance(x, Const) and x.value == 2 and y.dtype.is_floating_point:
        return apply("exp2", y)
    if exponent == 0.5:
        return apply("sqrt", x)
    if exponent == -0.5:
        return apply("rsqrt", x)
    if exponent is None or abs(exponent) > MOST_FACTORS or exponent != int(exponent):
        if not (x.dtype.is_floating_point or y.dtype.is_floating_point):
            raise NotLiftable("a power of integers")
        return apply("pow", x, y)
    if exponent < 0:
        return apply("div", const(1.0, x.dtype), power(x, const(-exponent, y.dtype)))
    if exponent < 2:
        return x if exponent else const(1, x.dtype)
    half = power(x, const(exponent // 2, y.dtype))
    return apply("mul", apply("mul", half, half), x) if exponent % 2 else apply("mul", half, half)


MOST_FACTORS = 8  # of a power that is written out


def _rounded_towards_zero(x: Node, y: Node) -> Node:
    return truncated(apply("div", x, y))


def truncated(a: Node) -> Node:
    """where(a < 0, ceil(a), floor(a))"""
    return where(apply("lt", a, const(0, a.dtype)), apply("ceil", a), apply("floor", a))


for _name in SAME_NAME.split():
    lifts(_name)(_unary(_name))
for _alias, _name in ALIASES.items():
    lifts(_alias)(_unary(_name))
for _aten, _ours in BINARY.items():
    lifts(_aten)(_binary(_ours))


@lifts("add", "sub", "subtract")
def add(ctx: Context, a, b, *, alpha=1) -> Lifted:
    op = "add" if "add" in ctx.node.target.__name__ else "sub"

    def go(x: Node, y: Node) -> Node:
        scaled = y if alpha == 1 else apply("mul", y, const(alpha, y.dtype))
        return _apply_binary(ctx, op, x, scaled)

    return pointwise(ctx, go, a, b)


@lifts("rsub")
def rsub(ctx: Context, a, b, alpha=1) -> Lifted:
    """b - alpha · a"""

    def go(x: Node, y: Node) -> Node:
        return _apply_binary(ctx, "sub", y, x if alpha == 1 else apply("mul", x, const(alpha, x.dtype)))

    return pointwise(ctx, go, a, b)


@lifts("div", "true_divide", "divide")
def div(ctx: Context, a, b, *, rounding_mode=None) -> Lifted:
    name = {None: "div", "floor": "floordiv", "trunc": "truncdiv"}[rounding_mode]
    return pointwise(ctx, lambda x, y: _apply_binary(ctx, name, x, y), a, b)


@lifts("clamp", "clip", "clamp_min", "clamp_max", "hardtanh")
def clamp(ctx: Context, x, *bounds, min=None, max=None) -> Lifted:
    name = ctx.node.target._schema.name.split("::")[1]
    bounds = (None, *bounds) if name == "clamp_max" else bounds
    if name == "hardtanh":
        bounds = (*bounds, *(-1.0, 1.0)[len(bounds) :])
    low = bounds[0] if bounds else min
    high = bounds[1] if len(bounds) > 1 else max
    out = x
    for op, bound in (("maximum", low), ("minimum", high)):
        if bound is not None:
            out = pointwise(ctx, lambda a, b, op=op: _apply_binary(ctx, op, a, b), out, bound)
    return out


@lifts("logical_not", "bitwise_not")
def logical_not(ctx: Context, x) -> Lifted:
    """not x; of the bits of an integer: -1 - x"""
    if x.body.dtype is torch.bool or "bitwise" not in ctx.node.target._schema.name:
        return pointwise(ctx, lambda a: apply("not", truth(a)), x)
    return pointwise(ctx, lambda a: apply("sub", const(-1), a), x)


@lifts("isclose")
def isclose(ctx: Context, a: Lifted, b: Lifted, rtol=1e-5, atol=1e-8, equal_nan=False) -> Lifted:
    """a = b or |a - b| ≤ atol + rtol · |b|, neither being infinite"""
    if equal_nan or not (a.body.dtype is b.body.dtype and a.body.dtype.is_floating_point):
        raise NotLiftable("isclose of what is not numbers of one floating type")

    def go(x: Node, y: Node) -> Node:
        away, size = apply("abs", apply("sub", x, y)), apply("abs", y)
        allowed = apply("add", const(atol, x.dtype), apply("mul", const(rtol, x.dtype), size))
        near = apply("and", apply("le", away, allowed), apply("lt", away, const(float("inf"), x.dtype)))
        return apply("or", apply("eq", x, y), near)

    return pointwise(ctx, go, a, b)


@lifts("bitwise_left_shift", "__lshift__")
def left_shift(ctx: Context, x, by) -> Lifted:
    """x · 2^by for a number `by`"""
    return pointwise(ctx, lambda a: apply("mul", a, const(_power_of_two(by))), x)


@lifts("bitwise_right_shift", "__rshift__")
def right_shift(ctx: Context, x, by) -> Lifted:
    """floor(x / 2^by) for a number `by`"""
    return pointwise(ctx, lambda a: apply("floordiv", a, const(_power_of_two(by))), x)


def _power_of_two(by) -> int:
    by = by.body.value if isinstance(by, Lifted) and isinstance(by.body, Const) else by
    if not (isinstance(by, int) and 0 <= by < 31):
        raise NotLiftable("a shift by what is no number from 0 to 30")
    return 1 << by


def truth(predicate: Node) -> Node:
    return predicate if predicate.dtype is torch.bool else apply("ne", predicate, const(0, predicate.dtype))


@lifts("where")
def where_(ctx: Context, condition, a, b) -> Lifted:
    return pointwise(ctx, lambda p, x, y: where(truth(p), cast(x, ctx.dtype), cast(y, ctx.dtype)), condition, a, b)


@lifts("masked_fill")
def masked_fill(ctx: Context, x, mask, value) -> Lifted:
    return pointwise(ctx, lambda a, p, v: where(truth(p), cast(v, a.dtype), a), x, mask, value)


@lifts("to", "_to_copy", "type_as", "float", "half", "bfloat16", "double", "bool", "long", "int")
def to(ctx: Context, x, *args, **kwargs) -> Lifted:
    if ctx.dtype is torch.bool:
        return pointwise(ctx, truth, x)
    return pointwise(ctx, lambda a: cast(a, ctx.dtype), x)


@lifts(
    "contiguous",
    "clone",
    "detach",
    "alias",
    "positive",
    "lift_fresh_copy",
    "dropout",
    "feature_dropout",
    "native_dropout",
)
def identity(ctx: Context, x, *args, **kwargs) -> Lifted:
    if "dropout" in ctx.node.target._schema.name and len(args) >= 2 and args[0] and args[1]:
        raise NotLiftable("dropout in training: random draws stay eager")
    return pointwise(ctx, lambda a: a, x)


@lifts("copy")
def copy(ctx: Context, x, src, non_blocking=False) -> Lifted:
    return pointwise(ctx, lambda a: cast(a, ctx.dtype), src)
