"""Norms, distances and moments, and the layers made of them. Moments are about the mean: E[x²] - E[x]² would cancel."""

from __future__ import annotations

import math

import torch

from rewriter.ir import Axis, Const, Node, apply, cast, const, fresh_axis, index, reduce
from rewriter.lift.reductions import count_of, dims_of, fold
from rewriter.lift.registry import Context, lifts
from rewriter.lift.values import Lifted, NotLiftable, broadcast_at, fresh_axes, positions


def mean_over(axes: tuple[Axis, ...], body: Node) -> Node:
    """sum x / n"""
    return apply("div", reduce("sum", axes, body), cast(count_of(axes), body.dtype))


def _squares(axes: tuple[Axis, ...], body: Node) -> Node:
    """sum (x - mean x)²"""
    away = apply("sub", body, mean_over(axes, body))
    return reduce("sum", axes, apply("mul", away, away))


def variance(axes: tuple[Axis, ...], body: Node, correction: Node) -> Node:
    """sum (x - mean x)² / max(n - correction, 0)"""
    degrees = apply("sub", cast(count_of(axes), body.dtype), correction)
    return apply("div", _squares(axes, body), apply("maximum", degrees, const(0.0, body.dtype)))


@lifts("mean")
def mean(ctx: Context, x: Lifted, dim=None, keepdim=False, *, dtype=None) -> Lifted:
    """sum x / n"""
    return fold(x, dims_of(dim, len(x.axes)), keepdim, lambda axes, body: mean_over(axes, cast(body, ctx.dtype)))


@lifts("var", "std", "var_mean", "std_mean")
def var(ctx: Context, x: Lifted, dim=None, unbiased=None, keepdim=False, *, correction=None):
    """sum (x - mean x)² / (n - correction), its root, and the mean beside it"""
    name, overload = ctx.node.target._schema.name.split("::")[1], ctx.node.target._overloadname
    if overload == "default":
        dim, unbiased = None, dim
    if correction is None:
        correction = 0 if unbiased is False else 1
    dims = dims_of(dim, len(x.axes))

    def spread(axes: tuple[Axis, ...], body: Node) -> Node:
        value = variance(axes, body, const(float(correction), body.dtype))
        return apply("sqrt", value) if name.startswith("std") else value

    out = fold(x, dims, keepdim, spread)
    return (out, fold(x, dims, keepdim, mean_over)) if name.endswith("_mean") else out


def norm_over(axes: tuple[Axis, ...], body: Node, order: float) -> Node:
    """(sum |x|^p)^(1/p); max |x| and min |x| for infinite p, how many are not 0 for p = 0"""
    size = apply("abs", body)
    if math.isinf(order):
        return reduce("max" if order > 0 else "min", axes, size)
    if order == 0:
        return reduce("sum", axes, cast(apply("ne", body, const(0, body.dtype)), body.dtype))
    if order == 1:
        return reduce("sum", axes, size)
    if order == 2:
        return apply("sqrt", reduce("sum", axes, apply("mul", body, body)))
    power = reduce("sum", axes, apply("pow", size, const(order, body.dtype)))
    return apply("pow", power, const(1 / order, body.dtype))


@lifts("linalg_vector_norm", "norm", "frobenius_norm")
def vector_norm(ctx: Context, x: Lifted, order=2, dim=None, keepdim=False, *, dtype=None) -> Lifted:
    """(sum |x|^p)^(1/p)"""
    if "frobenius" in ctx.node.target._schema.name:
        order, dim, keepdim = 2, order if order != 2 else None, bool(dim)
    order = 2.0 if order is None else float(order)
    dims = dims_of(dim, len(x.axes))
    return fold(x, dims, keepdim, lambda axes, body: norm_over(axes, cast(body, ctx.dtype), order))


@lifts("linalg_norm", "linalg_matrix_norm")
def linalg_norm(ctx: Context, x: Lifted, order=None, dim=None, keepdim=False, *, dtype=None) -> Lifted:
    """That of a vector along one dimension, or of all numbers of a matrix: no order, or fro"""
    if "matrix" in ctx.node.target._schema.name:
        order, dim = "fro" if order is None else order, [-2, -1] if dim is None else dim
    is_vector = order is None or len(dims_of(dim, len(x.axes))) == 1
    if order != "fro" and not is_vector:
        raise NotLiftable(f"the norm {order} of a matrix")
    return vector_norm(ctx, x, None if order == "fro" else order, dim, keepdim)


@lifts("dist")
def dist(ctx: Context, a: Lifted, b: Lifted, p=2) -> Lifted:
    """(sum |a - b|^p)^(1/p) over everything"""
    longer = a if len(a.axes) >= len(b.axes) else b
    axes = fresh_axes(longer.shape)
    away = apply("sub", broadcast_at(a, positions(axes)), broadcast_at(b, positions(axes)))
    return Lifted((), norm_over(axes, away, float(p)))


@lifts("cdist", "_cdist_forward")
def cdist(ctx: Context, a: Lifted, b: Lifted, p=2.0, compute_mode=None) -> Lifted:
    """(sum_d |a[i, d] - b[j, d]|^p)^(1/p), by differences: |a|² + |b|² - 2ab cancels"""
    axes = fresh_axes(ctx.shape)
    at = positions(axes)
    d = fresh_axis(a.axes[-1].extent)
    x, y = broadcast_at(a, (*at[:-1], index(d))), broadcast_at(b, (*at[:-2], at[-1], index(d)))
    return Lifted(axes, norm_over((d,), apply("sub", x, y), float(p)))


@lifts("pairwise_distance")
def pairwise_distance(ctx: Context, a: Lifted, b: Lifted, p=2.0, eps=1e-6, keepdim=False) -> Lifted:
    """(sum_d |a[d] - b[d] + eps|^p)^(1/p)"""
    axes = fresh_axes(ctx.shape)
    d = fresh_axis(max(a, b, key=lambda x: x.axes[-1].extent is not Const(1)).axes[-1].extent)
    at = (*positions(axes[:-1] if keepdim else axes), index(d))
    away = apply("sub", broadcast_at(a, at), broadcast_at(b, at))
    return Lifted(axes, norm_over((d,), apply("add", away, const(float(eps), away.dtype)), float(p)))


@lifts("cross", "linalg_cross")
def cross(ctx: Context, a: Lifted, b: Lifted, dim=-1) -> Lifted:
    """a[i + 1] b[i + 2] - a[i + 2] b[i + 1], of three coordinates"""
    if dim is None:
        raise NotLiftable("a cross product along a dimension that sizes decide")
    axes = fresh_axes(ctx.shape)
    at = list(positions(axes))
    dim = dim % len(axes)

    def moved(x: Lifted, by: int) -> Node:
        place = apply("mod", apply("add", at[dim], const(by)), const(3))
        return broadcast_at(x, (*at[:dim], place, *at[dim + 1 :]))

    return Lifted(axes, apply("sub", *(apply("mul", moved(a, k), moved(b, 3 - k)) for k in (1, 2))))


@lifts("cosine_similarity")
def cosine_similarity(ctx: Context, a: Lifted, b: Lifted, dim: int = 1, eps: float = 1e-8) -> Lifted:
    """sum_d a[d] b[d] / (max(|a|, eps) · max(|b|, eps))"""
    axes = fresh_axes(ctx.shape)
    rank = len(axes) + 1
    dim = dim % rank
    extents = [x.axes[dim - rank].extent for x in (a, b) if len(x.axes) >= rank - dim]
    d = fresh_axis(next((e for e in extents if e is not Const(1)), extents[0]))
    at = list(positions(axes))
    at.insert(dim, index(d))
    x, y = (cast(broadcast_at(v, tuple(at)), ctx.dtype) for v in (a, b))
    sizes = [apply("maximum", norm_over((d,), v, 2.0), const(eps, v.dtype)) for v in (x, y)]
    product = reduce("sum", (d,), apply("mul", x, y))
    return Lifted(axes, apply("div", product, apply("mul", *sizes)))


# Layers


def _affine(body: Node, weight: Lifted | None, bias: Lifted | None, at: tuple[Node, ...]) -> Node:
    body = body if weight is None else apply("mul", body, weight.at(at))
    return body if bias is None else apply("add", body, bias.at(at))


def _moments(axes: tuple[Axis, ...], body: Node, eps: float) -> tuple[Node, Node]:
    """(mean, 1 / √(var + eps))"""
    rstd = apply("rsqrt", apply("add", variance(axes, body, const(0.0)), const(float(eps))))
    return mean_over(axes, body), rstd


def _standardised(body: Node, mean: Node, rstd: Node) -> Node:
    return apply("mul", apply("sub", body, mean), rstd)


@lifts("layer_norm", "native_layer_norm")
def layer_norm(ctx: Context, x: Lifted, shape, weight=None, bias=None, eps=1e-5, *args):
    """(x - mean) / √(var + eps) · w + b over the last dimensions, in fp32 inside"""
    axes = fresh_axes(x.shape)
    kept, last = axes[: len(axes) - len(shape)], axes[len(axes) - len(shape) :]
    body = cast(x.at(positions(axes)), torch.float32)
    mean, rstd = _moments(last, body, eps)
    out = _affine(_standardised(body, mean, rstd), weight, bias, positions(last))
    if not isinstance(ctx.value, tuple):
        return Lifted(axes, cast(out, ctx.dtype))
    ones = tuple(fresh_axis(Const(1)) for _ in shape)
    return Lifted(axes, cast(out, ctx.value[0].dtype)), Lifted((*kept, *ones), mean), Lifted((*kept, *ones), rstd)


@lifts("rms_norm")
def rms_norm(ctx: Context, x: Lifted, shape, weight=None, eps=None) -> Lifted:
    """x / √(mean x² + eps) · w over the last dimensions, in fp32 inside"""
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    axes = fresh_axes(x.shape)
    last = axes[len(axes) - len(shape) :]
    body = cast(x.at(positions(axes)), torch.float32)
    square = mean_over(last, apply("mul", body, body))
    out = apply("mul", body, apply("rsqrt", apply("add", square, const(eps))))
    return Lifted(axes, cast(_affine(out, weight, None, positions(last)), ctx.dtype))


@lifts("group_norm")
def group_norm(ctx: Context, x: Lifted, groups: int, weight=None, bias=None, eps=1e-5, *args) -> Lifted:
    """(x - mean) / √(var + eps) · w[c] + b[c], the moments over the channels of a group and all positions"""
    return _by_channels(ctx, x, apply("floordiv", x.axes[1].extent, const(groups)), weight, bias, eps)


@lifts("instance_norm")
def instance_norm(ctx: Context, x: Lifted, weight, bias, mean, var, of_input, momentum, eps, *args) -> Lifted:
    """(x - mean) / √(var + eps) · w[c] + b[c], the moments over the positions of a channel"""
    if not of_input:
        raise NotLiftable("instance_norm with running statistics")
    return _by_channels(ctx, x, Const(1), weight, bias, eps)


def _by_channels(ctx: Context, x: Lifted, together: Node, weight, bias, eps: float) -> Lifted:
    """Standardises `together` channels at a time."""
    axes = fresh_axes(x.shape)
    batch, channel, *place = positions(axes)
    bound = (fresh_axis(together), *axes[2:])
    first = apply("mul", apply("floordiv", channel, together), together)
    group = cast(x.at((batch, apply("add", first, index(bound[0])), *place)), torch.float32)
    mean, rstd = _moments(bound, group, eps)
    out = _standardised(cast(x.at((batch, channel, *place)), torch.float32), mean, rstd)
    return Lifted(axes, cast(_affine(out, weight, bias, (channel,)), ctx.dtype))


@lifts("batch_norm")
def batch_norm(ctx: Context, x, weight, bias, mean, var, training, momentum, eps, *args) -> Lifted:
    """(x - mean[c]) / √(var[c] + eps) · w[c] + b[c] with running statistics"""
    if training or mean is None or var is None:
        raise NotLiftable("batch_norm with the statistics of the batch")
    axes = fresh_axes(x.shape)
    at = positions(axes)
    rstd = apply("rsqrt", apply("add", cast(var.at((at[1],)), torch.float32), const(float(eps))))
    body = apply("mul", apply("sub", cast(x.at(at), torch.float32), mean.at((at[1],))), rstd)
    return Lifted(axes, cast(_affine(body, weight, bias, (at[1],)), ctx.dtype))
