"""Pointwise functions with a name of their own, written with elementary ones."""

from __future__ import annotations

import math

import torch

from rewriter.ir import Const, Node, apply, cast, const, where
from rewriter.lift.pointwise import pointwise, truncated
from rewriter.lift.registry import Context, lifts, refuses, scalar
from rewriter.lift.values import Lifted, fresh_axes, positions


def _op(name: str):
    """An op of the IR as a function of nodes and numbers, numbers in the type of the first node."""

    def applied(*args) -> Node:
        dtype = next(a.dtype for a in args if isinstance(a, Node))
        return apply(name, *(a if isinstance(a, Node) else const(a, dtype) for a in args))

    return applied


add, sub, mul, div, neg = map(_op, ("add", "sub", "mul", "div", "neg"))
abs_, sign, maximum, minimum = map(_op, ("abs", "sign", "maximum", "minimum"))
exp, expm1, log, log1p, sqrt = map(_op, ("exp", "expm1", "log", "log1p", "sqrt"))
sigmoid, tanh, erf, sin, cos = map(_op, ("sigmoid", "tanh", "erf", "sin", "cos"))
lt, le, gt, eq, and_ = map(_op, ("lt", "le", "gt", "eq", "and"))


def floating(a: Node) -> Node:
    return a if a.dtype.is_floating_point else cast(a, torch.float32)


def formula(*names: str):
    """Registers a function of one node as the rule of ops without arguments; integers are taken as floats."""

    def register(function):
        lifts(*names)(lambda ctx, x: pointwise(ctx, lambda a: function(floating(a)), x))
        return function

    return register


# Elementary functions


@lifts("square")
def square(ctx: Context, x) -> Lifted:
    """x²  →  x · x"""
    return pointwise(ctx, lambda a: mul(a, a), x)


@formula("reciprocal")
def reciprocal(x: Node) -> Node:
    """1 / x"""
    return div(const(1.0, x.dtype), x)


@formula("log10")
def log10(x: Node) -> Node:
    """log x / log 10"""
    return div(log(x), math.log(10))


@formula("tan")
def tan(x: Node) -> Node:
    """sin x / cos x"""
    return div(sin(x), cos(x))


@formula("sinh")
def sinh(x: Node) -> Node:
    """sign x · (e + e / (e + 1)) / 2 with e = expm1 |x|; e / (e + 1) is 1 where e is infinite"""
    e = expm1(abs_(x))
    second = where(gt(abs_(x), 40.0), const(1.0, x.dtype), div(e, add(e, 1.0)))
    return mul(sign(x), mul(add(e, second), 0.5))


@formula("cosh")
def cosh(x: Node) -> Node:
    """(e · e + 1 / (e · e)) / 2 with e = exp(|x| / 2), which does not overflow before cosh does"""
    e = exp(mul(abs_(x), 0.5))
    return add(mul(mul(e, 0.5), e), div(div(const(0.5, x.dtype), e), e))


@formula("atanh", "arctanh")
def atanh(x: Node) -> Node:
    """log1p(2x / (1 - x)) / 2 of |x|, with the sign of x"""
    size = abs_(x)
    return mul(sign(x), mul(log1p(div(mul(size, 2.0), sub(const(1.0, x.dtype), size))), 0.5))


@lifts("trunc", "fix")
def trunc(ctx: Context, x) -> Lifted:
    """where(x < 0, ceil x, floor x)"""
    return pointwise(ctx, lambda a: truncated(a) if a.dtype.is_floating_point else a, x)


@formula("frac")
def frac(x: Node) -> Node:
    """x - trunc x"""
    return sub(x, truncated(x))


@formula("deg2rad")
def deg2rad(x: Node) -> Node:
    return mul(x, math.pi / 180)


@formula("rad2deg")
def rad2deg(x: Node) -> Node:
    return mul(x, 180 / math.pi)


@formula("isfinite")
def isfinite(x: Node) -> Node:
    """|x| < inf, which NaN is not"""
    return lt(abs_(x), math.inf)


@formula("isposinf")
def isposinf(x: Node) -> Node:
    return eq(x, math.inf)


@formula("isneginf")
def isneginf(x: Node) -> Node:
    return eq(x, -math.inf)


@lifts("nan_to_num")
def nan_to_num(ctx: Context, x, nan=None, posinf=None, neginf=None) -> Lifted:
    """where(isnan(x), nan, where(x == inf, posinf, where(x == -inf, neginf, x))); the defaults are 0 and what is
    largest
    """
    if not ctx.dtype.is_floating_point:
        return pointwise(ctx, lambda a: a, x)
    limits = torch.finfo(ctx.dtype)
    high = limits.max if posinf is None else posinf
    low = limits.min if neginf is None else neginf

    def go(a: Node) -> Node:
        out = where(apply("isnan", a), const(0.0 if nan is None else nan, a.dtype), a)
        return where(apply("isinf", a), where(gt(a, 0.0), const(high, a.dtype), const(low, a.dtype)), out)

    return pointwise(ctx, go, x)


# Logarithms of sums and products


@lifts("xlogy", "special_xlogy")
def xlogy(ctx: Context, x, y) -> Lifted:
    """where(x == 0, 0, x · log y), NaN where y is"""
    return pointwise(ctx, lambda a, b: _times_log(floating(a), floating(b), log), x, y)


@lifts("special_xlog1py")
def xlog1py(ctx: Context, x, y) -> Lifted:
    """where(x == 0, 0, x · log1p y), NaN where y is"""
    return pointwise(ctx, lambda a, b: _times_log(floating(a), floating(b), log1p), x, y)


def _times_log(x: Node, y: Node, logarithm) -> Node:
    product = mul(x, logarithm(y))
    return where(and_(eq(x, 0.0), eq(y, y)), const(0.0, product.dtype), product)


@formula("special_entr")
def entr(x: Node) -> Node:
    """where(x == 0, 0, -x · log x), -inf below 0"""
    inside = where(eq(x, 0.0), const(0.0, x.dtype), neg(mul(x, log(x))))
    return where(lt(x, 0.0), const(-math.inf, x.dtype), inside)


@lifts("logaddexp")
def logaddexp(ctx: Context, x, y) -> Lifted:
    """max(x, y) + log1p(exp(-|x - y|)); the same infinity where both are one"""
    return pointwise(ctx, lambda a, b: _log_of_sum(a, b, 1.0), x, y)


@lifts("logaddexp2")
def logaddexp2(ctx: Context, x, y) -> Lifted:
    """max(x, y) + log2(1 + 2^-|x - y|)"""
    return pointwise(ctx, lambda a, b: _log_of_sum(a, b, math.log(2)), x, y)


def _log_of_sum(a: Node, b: Node, base: float) -> Node:
    away = neg(abs_(sub(a, b)))
    more = log1p(exp(away if base == 1.0 else mul(away, base)))
    out = add(maximum(a, b), more if base == 1.0 else div(more, base))
    return where(and_(apply("isinf", a), eq(a, b)), a, out)


@formula("log_sigmoid")
def log_sigmoid(x: Node) -> Node:
    """min(x, 0) - log1p(exp(-|x|))"""
    return sub(minimum(x, 0.0), log1p(exp(neg(abs_(x)))))


@lifts("logit", "special_logit")
def logit(ctx: Context, x, eps=None) -> Lifted:
    """log(x / (1 - x)), x first clamped to [eps, 1 - eps]"""

    def go(a: Node) -> Node:
        a = floating(a)
        a = a if eps is None else minimum(maximum(a, eps), 1.0 - eps)
        return log(div(a, sub(const(1.0, a.dtype), a)))

    return pointwise(ctx, go, x)


# Activations


@lifts("relu")
def relu(ctx: Context, x) -> Lifted:
    """max(x, 0)"""
    return pointwise(ctx, lambda a: maximum(a, 0), x)


@lifts("relu6")
def relu6(ctx: Context, x) -> Lifted:
    """min(max(x, 0), 6)"""
    return pointwise(ctx, lambda a: minimum(maximum(a, 0), 6), x)


@formula("silu")
def silu(x: Node) -> Node:
    """x · sigmoid x"""
    return mul(x, sigmoid(x))


@lifts("gelu")
def gelu(ctx: Context, x, *, approximate="none") -> Lifted:
    """x/2 · (1 + erf(x / √2)), or with tanh(√(2/π) (x + 0.044715 x³)) for erf"""

    def exact(a: Node) -> Node:
        return mul(mul(a, 0.5), add(erf(mul(a, math.sqrt(0.5))), 1.0))

    def by_tanh(a: Node) -> Node:
        inner = mul(add(a, mul(mul(mul(a, a), a), 0.044715)), math.sqrt(2 / math.pi))
        return mul(mul(a, 0.5), add(tanh(inner), 1.0))

    return pointwise(ctx, by_tanh if approximate == "tanh" else exact, x)


@lifts("leaky_relu")
def leaky_relu(ctx: Context, x, negative_slope=0.01) -> Lifted:
    """where(x > 0, x, slope · x)"""
    return pointwise(ctx, lambda a: where(gt(a, 0), a, mul(a, negative_slope)), x)


@lifts("prelu", "_prelu_kernel")
def prelu(ctx: Context, x, weight) -> Lifted:
    """where(x > 0, x, w · x), w by channel: that is dimension 1"""
    if weight.axes and weight.axes[-1].extent is not Const(1) and len(x.axes) != len(weight.axes):
        axes = fresh_axes(ctx.shape)
        at = positions(axes)
        a, w = x.at(at), weight.at((at[1 if len(at) > 1 else 0],))
        return Lifted(axes, where(gt(a, 0), a, mul(a, w)))
    return pointwise(ctx, lambda a, w: where(gt(a, 0), a, mul(a, w)), x, weight)


@lifts("softplus")
def softplus(ctx: Context, x, beta=1, threshold=20) -> Lifted:
    """where(βx > threshold, x, log1p(exp(βx)) / β)"""

    def go(a: Node) -> Node:
        scaled = mul(a, float(beta))
        return where(gt(scaled, float(threshold)), a, div(log1p(exp(scaled)), float(beta)))

    return pointwise(ctx, go, x)


@lifts("elu", "celu", "selu")
def elu(ctx: Context, x, alpha=1.0, scale=1.0, input_scale=1.0) -> Lifted:
    """scale · where(x > 0, x, α · expm1(input_scale · x)); celu: input_scale is 1 / α; selu: α and scale are
    constants
    """
    name = ctx.node.target._schema.name.split("::")[1]
    if name == "selu":
        alpha, scale = 1.6732632423543772848, 1.0507009873554804934
    if name == "celu":
        input_scale = 1 / alpha

    def go(a: Node) -> Node:
        below = mul(expm1(a if input_scale == 1 else mul(a, float(input_scale))), float(alpha))
        out = where(gt(a, 0.0), a, below)
        return out if scale == 1 else mul(out, float(scale))

    return pointwise(ctx, go, x)


@formula("mish")
def mish(x: Node) -> Node:
    """x · tanh(log1p(exp x)), the logarithm x itself where x > 20"""
    return mul(x, tanh(where(gt(x, 20.0), x, log1p(exp(x)))))


@formula("hardsigmoid")
def hardsigmoid(x: Node) -> Node:
    """min(max(x + 3, 0), 6) / 6"""
    return div(minimum(maximum(add(x, 3.0), 0.0), 6.0), 6.0)


@formula("hardswish")
def hardswish(x: Node) -> Node:
    """x · min(max(x + 3, 0), 6) / 6"""
    return div(mul(x, minimum(maximum(add(x, 3.0), 0.0), 6.0)), 6.0)


@lifts("threshold")
def threshold(ctx: Context, x, least, value) -> Lifted:
    """where(x <= least, value, x)"""
    return pointwise(ctx, lambda a: where(le(a, least), const(value, a.dtype), a), x)


@lifts("softshrink")
def softshrink(ctx: Context, x, lambd=0.5) -> Lifted:
    """where(x > λ, x - λ, where(x < -λ, x + λ, 0))"""

    def go(a: Node) -> Node:
        low = where(lt(a, -lambd), add(a, lambd), mul(a, 0.0))
        return where(gt(a, lambd), sub(a, lambd), low)

    return pointwise(ctx, go, x)


@lifts("hardshrink")
def hardshrink(ctx: Context, x, lambd=0.5) -> Lifted:
    """where(|x| <= λ, 0, x)"""
    return pointwise(ctx, lambda a: where(le(abs_(a), lambd), const(0.0, a.dtype), a), x)


@lifts("glu")
def glu(ctx: Context, x, dim: int = -1) -> Lifted:
    """x[.., :h] · sigmoid(x[.., h:])"""
    axes = fresh_axes(ctx.shape)
    at, dim = positions(axes), dim % len(axes)
    gate = x.at((*at[:dim], add(at[dim], axes[dim].extent), *at[dim + 1 :]))
    return Lifted(axes, mul(x.at(at), sigmoid(gate)))


# Of several tensors


@lifts("hypot")
def hypot(ctx: Context, x, y) -> Lifted:
    """largest · √(1 + (smaller / largest)²)"""

    def go(a: Node, b: Node) -> Node:
        large, small = maximum(abs_(a), abs_(b)), minimum(abs_(a), abs_(b))
        ratio = div(small, where(eq(large, 0.0), const(1.0, a.dtype), large))
        return mul(large, sqrt(add(mul(ratio, ratio), 1.0)))

    return pointwise(ctx, go, x, y)


@lifts("fmax", "fmin")
def fmax(ctx: Context, x, y) -> Lifted:
    """The larger (or smaller); the other where one is NaN."""
    of = maximum if "fmax" in ctx.node.target._schema.name else minimum

    def go(a: Node, b: Node) -> Node:
        return where(apply("isnan", a), b, where(apply("isnan", b), a, of(a, b)))

    return pointwise(ctx, go, x, y)


@lifts("heaviside")
def heaviside(ctx: Context, x, values) -> Lifted:
    """where(x == 0, values, x > 0)"""
    return pointwise(ctx, lambda a, v: where(eq(a, 0), v, cast(gt(a, 0), a.dtype)), x, values)


@lifts("lerp")
def lerp(ctx: Context, start, end, weight) -> Lifted:
    """(1 - w) · start + w · end"""

    def go(a: Node, b: Node, w: Node) -> Node:
        return add(mul(a, sub(const(1.0, w.dtype), w)), mul(b, w))

    return pointwise(ctx, go, start, end, weight)


@lifts("addcmul", "addcdiv")
def addcmul(ctx: Context, x, a, b, *, value=1) -> Lifted:
    """x + value · a · b, or a / b for the product"""
    of = mul if "addcmul" in ctx.node.target._schema.name else div

    def go(at: Node, u: Node, v: Node) -> Node:
        product = of(u, v)
        return add(at, product if value == 1 else mul(product, scalar(value, product.dtype)))

    return pointwise(ctx, go, x, a, b)


refuses(
    "Triton's language has no such function, and no formula of those it has is accurate",
    *("erfc", "special_erfc", "lgamma", "digamma", "erfinv", "special_erfinv", "atan", "arctan", "atan2", "arctan2"),
    *("asin", "arcsin", "acos", "arccos", "asinh", "arcsinh", "acosh", "arccosh"),
)
