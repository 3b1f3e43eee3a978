"""Pointwise ATen ops: mostly a table from their name to ours."""

from __future__ import annotations

import math

import torch

from rewriter.ir import Node, apply, cast, const, where
from rewriter.lift.registry import Context, lifts, operand, scalar
from rewriter.lift.values import Lifted, NotLiftable, broadcast_at, fresh_axes, positions

SAME_NAME = (
    "neg abs sign exp exp2 log log2 log1p expm1 sqrt rsqrt sin cos tanh sigmoid erf floor ceil isinf isnan"
)
BINARY = {
    "mul": "mul",
    "maximum": "maximum",
    "minimum": "minimum",
    "max.other": "maximum",
    "min.other": "minimum",
    "pow": "pow",
    "remainder": "mod",
    "floor_divide": "floordiv",
    "eq": "eq",
    "ne": "ne",
    "lt": "lt",
    "le": "le",
    "gt": "gt",
    "ge": "ge",
    "logical_and": "and",
    "logical_or": "or",
    "logical_xor": "xor",
    "__and__": "and",
    "__or__": "or",
    "__xor__": "xor",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
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
    from rewriter.ir.ops import OPS

    return cast(a, torch.float32) if OPS[name].kind == "float" and not a.dtype.is_floating_point else a


def _binary(name: str):
    def rule(ctx: Context, a, b) -> Lifted:
        return pointwise(ctx, lambda x, y: _apply_binary(ctx, name, x, y), a, b)

    return rule


def _apply_binary(ctx: Context, name: str, x: Node, y: Node) -> Node:
    if name in ("and", "or", "xor") and x.dtype is not torch.bool:
        raise NotLiftable("bitwise arithmetic on integers")
    if name == "pow" and y in (const(2, y.dtype), const(2.0)):
        return apply("mul", x, x)
    if ctx.dtype.is_floating_point:
        x, y = (n if n.dtype.is_floating_point else cast(n, ctx.dtype) for n in (x, y))
    return apply(name, x, y)


for _name in SAME_NAME.split():
    lifts(_name)(_unary(_name))
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
    if alpha != 1:
        raise NotLiftable("rsub with alpha")
    return pointwise(ctx, lambda x, y: _apply_binary(ctx, "sub", y, x), a, b)


@lifts("div", "true_divide", "divide")
def div(ctx: Context, a, b, *, rounding_mode=None) -> Lifted:
    name = {None: "div", "floor": "floordiv", "trunc": "truncdiv"}[rounding_mode]
    return pointwise(ctx, lambda x, y: _apply_binary(ctx, name, x, y), a, b)


@lifts("square")
def square(ctx: Context, x) -> Lifted:
    return pointwise(ctx, lambda a: apply("mul", a, a), x)


@lifts("reciprocal")
def reciprocal(ctx: Context, x) -> Lifted:
    return pointwise(ctx, lambda a: apply("div", const(1.0, a.dtype), a), x)


@lifts("relu")
def relu(ctx: Context, x) -> Lifted:
    return pointwise(ctx, lambda a: apply("maximum", a, const(0, a.dtype)), x)


@lifts("silu")
def silu(ctx: Context, x) -> Lifted:
    return pointwise(ctx, lambda a: apply("mul", a, apply("sigmoid", a)), x)


@lifts("gelu")
def gelu(ctx: Context, x, *, approximate="none") -> Lifted:
    def exact(a: Node) -> Node:
        inner = apply("erf", apply("mul", a, const(math.sqrt(0.5), a.dtype)))
        return apply("mul", apply("mul", a, const(0.5, a.dtype)), apply("add", inner, const(1.0, a.dtype)))

    def by_tanh(a: Node) -> Node:
        cube = apply("mul", apply("mul", a, a), a)
        inner = apply("add", a, apply("mul", cube, const(0.044715, a.dtype)))
        inner = apply("tanh", apply("mul", inner, const(math.sqrt(2 / math.pi), a.dtype)))
        return apply("mul", apply("mul", a, const(0.5, a.dtype)), apply("add", inner, const(1.0, a.dtype)))

    return pointwise(ctx, by_tanh if approximate == "tanh" else exact, x)


@lifts("leaky_relu")
def leaky_relu(ctx: Context, x, negative_slope=0.01) -> Lifted:
    def go(a: Node) -> Node:
        return where(apply("gt", a, const(0, a.dtype)), a, apply("mul", a, const(negative_slope, a.dtype)))

    return pointwise(ctx, go, x)


@lifts("softplus")
def softplus(ctx: Context, x, beta=1, threshold=20) -> Lifted:
    def go(a: Node) -> Node:
        scaled = apply("mul", a, const(float(beta), a.dtype))
        soft = apply("div", apply("log1p", apply("exp", scaled)), const(float(beta), a.dtype))
        return where(apply("gt", scaled, const(float(threshold), a.dtype)), a, soft)

    return pointwise(ctx, go, x)


@lifts("elu")
def elu(ctx: Context, x, alpha=1, scale=1, input_scale=1) -> Lifted:
    if scale != 1 or input_scale != 1:
        raise NotLiftable("elu with scales")

    def go(a: Node) -> Node:
        low = apply("mul", apply("expm1", a), const(float(alpha), a.dtype))
        return where(apply("gt", a, const(0, a.dtype)), a, low)

    return pointwise(ctx, go, x)


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
    if x.body.dtype is not torch.bool:
        if "bitwise" in ctx.node.target._schema.name:
            raise NotLiftable("bitwise arithmetic on integers")
        return pointwise(ctx, lambda a: apply("eq", a, const(0, a.dtype)), x)
    return pointwise(ctx, lambda a: apply("not", a), x)


def _truth(predicate: Node) -> Node:
    return predicate if predicate.dtype is torch.bool else apply("ne", predicate, const(0, predicate.dtype))


def _as(node: Node, dtype: torch.dtype) -> Node:
    return cast(node, dtype)


@lifts("where")
def where_(ctx: Context, condition, a, b) -> Lifted:
    return pointwise(
        ctx, lambda p, x, y: where(_truth(p), _as(x, ctx.dtype), _as(y, ctx.dtype)), condition, a, b
    )


@lifts("masked_fill")
def masked_fill(ctx: Context, x, mask, value) -> Lifted:
    return pointwise(ctx, lambda a, p, v: where(_truth(p), _as(v, a.dtype), a), x, mask, value)


@lifts("to", "_to_copy", "type_as", "float", "half", "bfloat16", "double", "bool", "long", "int")
def to(ctx: Context, x, *args, **kwargs) -> Lifted:
    if ctx.dtype is torch.bool:
        return pointwise(ctx, _truth, x)
    return pointwise(ctx, lambda a: cast(a, ctx.dtype), x)


@lifts(
    "contiguous",
    "clone",
    "detach",
    "alias",
    "lift_fresh_copy",
    "dropout",
    "feature_dropout",
    "native_dropout",
)
def identity(ctx: Context, x, *args, **kwargs) -> Lifted:
    if "dropout" in ctx.node.target._schema.name and len(args) >= 2 and args[0] and args[1]:
        raise NotLiftable("dropout in training: random draws stay eager")
    return pointwise(ctx, lambda a: a, x)


@lifts("nan_to_num")
def nan_to_num(ctx: Context, x, nan=None, posinf=None, neginf=None) -> Lifted:
    """where(isnan(x), nan, x); infinities, which torch makes finite too, only where the program names their values."""
    limits = torch.finfo(ctx.dtype)

    def go(a: Node) -> Node:
        out = where(apply("isnan", a), const(0.0 if nan is None else nan, a.dtype), a)
        high = const(limits.max if posinf is None else posinf, a.dtype)
        low = const(limits.min if neginf is None else neginf, a.dtype)
        return where(apply("isinf", a), where(apply("gt", a, const(0.0, a.dtype)), high, low), out)

    return pointwise(ctx, go, x)


@lifts("copy")
def copy(ctx: Context, x, src, non_blocking=False) -> Lifted:
    return pointwise(ctx, lambda a: cast(a, ctx.dtype), src)
