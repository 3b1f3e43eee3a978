"""Reductions: sums and maxima, where the maximum stands, softmax and what is made of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from rewriter.ir import (
    Axis,
    Const,
    Node,
    apply,
    cast,
    const,
    fresh_axis,
    index,
    reduce,
    where,
)
from rewriter.ir.integer import product
from rewriter.lift.pointwise import truth
from rewriter.lift.registry import Context, lifts, refuses
from rewriter.lift.values import Lifted, NotLiftable, broadcast_at, fresh_axes, positions


def dims_of(dim, rank: int) -> tuple[int, ...]:
    """The dimensions an op reduces: all where it names none."""
    if dim is None or dim == []:
        return tuple(range(rank))
    return tuple(sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim)))


def fold(x: Lifted, dims: tuple[int, ...], keepdim: bool, make: Callable[[tuple[Axis, ...], Node], Node]) -> Lifted:
    """Reduces `dims` with `make(axes, body)`; kept dimensions have extent 1."""
    bound = tuple(fresh_axis(x.axes[d].extent) for d in dims)
    kept = fresh_axes(tuple(a.extent for d, a in enumerate(x.axes) if d not in dims))
    inner, outer = iter(bound), iter(kept)
    at = tuple(index(next(inner)) if d in dims else index(next(outer)) for d in range(len(x.axes)))
    body = make(bound, x.at(at))
    if not keepdim:
        return Lifted(kept, body)
    outer = iter(kept)
    axes = tuple(fresh_axis(Const(1)) if d in dims else next(outer) for d in range(len(x.axes)))
    return Lifted(axes, body)


def _reduction(op: str) -> Callable:
    def rule(ctx: Context, x: Lifted, dim=None, keepdim=False, *, dtype=None) -> Lifted:
        value = ctx.value[0] if isinstance(ctx.value, (tuple, list)) else ctx.value
        return fold(x, dims_of(dim, len(x.axes)), keepdim, lambda axes, body: _reduce(op, axes, body, value.dtype))

    return rule


_OF_TRUTH = {"max": "any", "min": "all"}


def _reduce(op: str, axes: tuple[Axis, ...], body: Node, dtype: torch.dtype) -> Node:
    """⊕ in the type of the result; the largest truth value is any, the least all."""
    if op in ("any", "all"):
        return cast(reduce(op, axes, truth(body)), dtype)
    return reduce(_OF_TRUTH.get(op, op) if dtype is torch.bool else op, axes, cast(body, dtype))


for _aten, _op in {
    "sum": "sum",
    "amax": "max",
    "amin": "min",
    "any": "any",
    "all": "all",
    "prod": "prod",
}.items():
    lifts(_aten)(_reduction(_op))


@lifts("max", "min")
def whole_max(ctx: Context, x: Lifted) -> Lifted:
    return _reduction(ctx.node.target._schema.name.split("::")[1])(ctx, x)


@lifts("count_nonzero")
def count_nonzero(ctx: Context, x: Lifted, dim=None) -> Lifted:
    """sum of x != 0"""
    return fold(
        x, dims_of(dim, len(x.axes)), False, lambda axes, body: reduce("sum", axes, cast(truth(body), ctx.dtype))
    )


@lifts("nansum")
def nansum(ctx: Context, x: Lifted, dim=None, keepdim=False, *, dtype=None) -> Lifted:
    """sum of where(isnan(x), 0, x)"""

    def make(axes: tuple[Axis, ...], body: Node) -> Node:
        body = cast(body, ctx.dtype)
        return reduce("sum", axes, where(apply("isnan", body), const(0.0, body.dtype), body))

    return fold(x, dims_of(dim, len(x.axes)), keepdim, make)


@lifts("aminmax")
def aminmax(ctx: Context, x: Lifted, *, dim=None, keepdim=False) -> tuple[Lifted, Lifted]:
    return tuple(_reduction(op)(ctx, x, dim, keepdim) for op in ("min", "max"))


def first_position(op: str, axes: tuple[Axis, ...], body: Node) -> Node:
    """The first position of the maximum (or minimum): min of i over those with x[i] == max x.

    Positions are counted row-major over `axes`. Nothing equals a maximum that is NaN: torch then says 0, as here. Truth
    values are 0 and 1."""
    if body.dtype is torch.bool:
        body = cast(body, torch.int32)
    at: Node = Const(0)
    for axis in axes:
        at = apply("add", apply("mul", at, axis.extent), index(axis))
    first = reduce("min", axes, at, apply("eq", body, reduce(op, axes, body)))
    return where(apply("lt", first, count_of(axes)), first, Const(0))


def count_of(axes: tuple[Axis, ...]) -> Node:
    """How many positions axes have."""
    return product(a.extent for a in axes)


@lifts("max.dim", "min.dim")
def max_dim(ctx: Context, x: Lifted, dim: int, keepdim: bool = False) -> tuple[Lifted, Lifted]:
    """max x, and the first position that has it"""
    op = ctx.node.target._schema.name.split("::")[1]
    positions = fold(x, dims_of(dim, len(x.axes)), keepdim, lambda axes, body: first_position(op, axes, body))
    return _reduction(op)(ctx, x, dim, keepdim), positions


@lifts("argmax", "argmin")
def argmax(ctx: Context, x: Lifted, dim=None, keepdim: bool = False) -> Lifted:
    """The first position of the maximum"""
    op = ctx.node.target._schema.name.split("::")[1].removeprefix("arg")
    return fold(x, dims_of(dim, len(x.axes)), keepdim, lambda axes, body: first_position(op, axes, body))


def _stable(body: Node, axes: tuple[Axis, ...]) -> tuple[Node, Node]:
    """(maximum over axes, exp of the difference to it)"""
    top = reduce("max", axes, body)
    return top, apply("exp", apply("sub", body, top))


def _over(x: Lifted, dim: int, make: Callable[[tuple[Axis, ...], Node], Node]) -> Lifted:
    """A function of a whole line that keeps its axis: softmax and its kin."""
    axes = fresh_axes(x.shape)
    at = positions(axes)
    return Lifted(axes, make((axes[dim],), x.at(at)))


def _promoted(ctx: Context, x: Lifted) -> Lifted:
    return Lifted(x.axes, cast(x.body, ctx.dtype))


@lifts("softmax", "special_softmax", "_softmax")
def softmax(ctx: Context, x: Lifted, dim: int, *args, **kwargs) -> Lifted:
    """exp(x - max x) / sum exp(x - max x)"""

    def make(axes: tuple[Axis, ...], body: Node) -> Node:
        _, e = _stable(body, axes)
        return apply("div", e, reduce("sum", axes, e))

    return _over(_promoted(ctx, x), dim % len(x.axes), make)


@lifts("_safe_softmax")
def safe_softmax(ctx: Context, x: Lifted, dim: int, dtype=None) -> Lifted:
    """softmax, with zeros for a line that is -inf throughout"""

    def make(axes: tuple[Axis, ...], body: Node) -> Node:
        top, e = _stable(body, axes)
        empty = apply("eq", top, const(-math.inf, top.dtype))
        return where(empty, const(0.0, body.dtype), apply("div", e, reduce("sum", axes, e)))

    return _over(_promoted(ctx, x), dim % len(x.axes), make)


@lifts("log_softmax", "special_log_softmax", "_log_softmax")
def log_softmax(ctx: Context, x: Lifted, dim: int, *args, **kwargs) -> Lifted:
    """x - max x - log sum exp(x - max x)"""

    def make(axes: tuple[Axis, ...], body: Node) -> Node:
        top, e = _stable(body, axes)
        return apply("sub", apply("sub", body, top), apply("log", reduce("sum", axes, e)))

    return _over(_promoted(ctx, x), dim % len(x.axes), make)


@lifts("logsumexp", "special_logsumexp")
def logsumexp(ctx: Context, x: Lifted, dim, keepdim: bool = False) -> Lifted:
    """max x + log sum exp(x - max x), torch's -inf for an empty or all -inf line included."""

    def make(axes: tuple[Axis, ...], body: Node) -> Node:
        top = reduce("max", axes, body)
        shift = where(apply("isinf", top), const(0.0, body.dtype), top)
        total = reduce("sum", axes, apply("exp", apply("sub", body, shift)))
        return apply("add", shift, apply("log", total))

    return fold(x, dims_of(dim, len(x.axes)), keepdim, make)


@lifts("scaled_dot_product_attention")
def scaled_dot_product_attention(
    ctx: Context, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
) -> Lifted:
    """softmax(q k^T · scale + mask) v in fp32 inside, with torch's zeros for rows that are masked throughout."""
    if dropout_p:
        raise NotLiftable("dropout: random draws stay eager")
    axes = fresh_axes(ctx.shape)
    *lead, m, e = positions(axes)
    n, d = fresh_axis(k.axes[-2].extent), fresh_axis(q.axes[-1].extent)
    group = apply("floordiv", q.axes[-3].extent, k.axes[-3].extent) if enable_gqa else Const(1)
    kv_lead = [*lead[:-1], apply("floordiv", lead[-1], group)] if enable_gqa else lead
    query = broadcast_at(q, (*lead, m, index(d)))
    key = broadcast_at(k, (*kv_lead, index(n), index(d)))
    factor = apply("rsqrt", cast(d.extent, torch.float32)) if scale is None else const(float(scale))
    s = apply("mul", reduce("sum", (d,), apply("mul", query, key)), cast(factor, query.dtype))
    s = _masked(cast(s, torch.float32), attn_mask, is_causal, (*lead, m, index(n)))
    top, weight = _stable(s, (n,))
    value = broadcast_at(v, (*kv_lead, index(n), e))
    total = reduce("sum", (n,), weight)
    out = cast(reduce("sum", (n,), apply("mul", apply("div", weight, total), value)), ctx.dtype)
    empty = apply("eq", top, const(-math.inf, top.dtype))
    never_empty = attn_mask is None  # causal rows always see column 0
    return Lifted(axes, out if never_empty else where(empty, const(0, out.dtype), out))


def _masked(s: Node, mask: Lifted | None, is_causal: bool, at: tuple[Node, ...]) -> Node:
    if is_causal:
        s = where(apply("le", at[-1], at[-2]), s, const(-math.inf, s.dtype))
    if mask is None:
        return s
    value = broadcast_at(mask, at)
    if value.dtype is torch.bool:
        return where(value, s, const(-math.inf, s.dtype))
    return apply("add", s, cast(value, s.dtype))


refuses("a scan: each element reads all before it", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")
refuses(
    "an order of the elements, which is no reduction",
    *("sort", "argsort", "topk", "kthvalue", "median", "nanmedian", "mode", "searchsorted"),
)
