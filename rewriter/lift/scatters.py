"""Assignments to parts of a tensor: `x` with a slice, a row, a diagonal or what a mask says replaced."""

from __future__ import annotations

import functools

import torch
from torch import fx

from rewriter.ir import Const, Node, apply, cast, index, reduce, where
from rewriter.lift.registry import Context, lifts, operand, rule_for, scalar
from rewriter.lift.values import (
    Lifted,
    NotLiftable,
    broadcast_at,
    first_of,
    fresh_axes,
    positions,
    wrapped,
)
from rewriter.trace.calls import call_name

FEW = 8  # indices that a tile is compared with, one after the other


def _replaced(ctx: Context, x: Lifted, inside, new) -> Lifted:
    """where(inside(at), new(at), x[at])"""
    axes = fresh_axes(ctx.shape)
    at = positions(axes)
    return Lifted(axes, where(inside(at), cast(new(at), ctx.dtype), x.at(at)))


@lifts("slice_scatter")
def slice_scatter(ctx: Context, x: Lifted, src: Lifted, dim=0, start=None, end=None, step=1) -> Lifted:
    """where(start ≤ i and (i - start) % step == 0 and (i - start) // step < len(src), src[(i - start) // step], x[i])"""
    dim = dim % len(x.axes)
    first, step = first_of(scalar(0 if start is None else start), x.axes[dim].extent), scalar(step)

    def inside(at: tuple[Node, ...]) -> Node:
        moved = apply("sub", at[dim], first)
        on = apply("eq", apply("mod", moved, step), Const(0))
        within = apply("lt", apply("floordiv", moved, step), src.axes[dim].extent)
        return apply("and", apply("and", apply("ge", moved, Const(0)), on), within)

    def new(at: tuple[Node, ...]) -> Node:
        return src.at((*at[:dim], apply("floordiv", apply("sub", at[dim], first), step), *at[dim + 1 :]))

    return _replaced(ctx, x, inside, new)


@lifts("select_scatter")
def select_scatter(ctx: Context, x: Lifted, src: Lifted, dim: int, at) -> Lifted:
    """where(i == at, src, x[i])"""
    dim = dim % len(x.axes)
    place = scalar(at) if not isinstance(at, int) or at >= 0 else apply("add", x.axes[dim].extent, Const(at))
    return _replaced(ctx, x, lambda i: apply("eq", i[dim], place), lambda i: src.at((*i[:dim], *i[dim + 1 :])))


@lifts("diagonal_scatter")
def diagonal_scatter(ctx: Context, x: Lifted, src: Lifted, offset=0, dim1=0, dim2=1) -> Lifted:
    """where(j - i == offset, src[min(i, j)], x[i, j]); a diagonal's own dimension is the last"""
    dim1, dim2, shift = dim1 % len(x.axes), dim2 % len(x.axes), scalar(offset)
    if not isinstance(offset, int):
        raise NotLiftable("a diagonal that sizes decide")

    def new(at: tuple[Node, ...]) -> Node:
        along = at[dim1] if offset >= 0 else at[dim2]
        return src.at((*(i for d, i in enumerate(at) if d not in (dim1, dim2)), along))

    return _replaced(ctx, x, lambda at: apply("eq", apply("sub", at[dim2], at[dim1]), shift), new)


@lifts("scatter.src", "scatter.value")
def scatter(ctx: Context, x: Lifted, dim: int, indices: Lifted, src) -> Lifted:
    """where(i == indices[0], src, x[i]), and where(any_k (i == indices[k]), value, x[i]) for a few of them"""
    dim, extent = dim % len(x.axes), indices.axes[dim].extent
    most = 1 if isinstance(src, Lifted) and src.axes else FEW
    if not (isinstance(extent, Const) and 1 <= extent.value <= most):
        raise NotLiftable("assignment by an index for each element")
    turns = fresh_axes((extent,))

    def along(at: tuple[Node, ...], place: Node) -> tuple[Node, ...]:
        return (*at[:dim], place, *at[dim + 1 :])

    def inside(at: tuple[Node, ...]) -> Node:
        (k,) = positions(turns)
        found = reduce("any", turns, apply("eq", at[dim], indices.at(along(at, k))))
        within = (apply("lt", i, a.extent) for d, (i, a) in enumerate(zip(at, indices.axes)) if d != dim)
        return functools.reduce(lambda a, b: apply("and", a, b), within, found)

    def new(at: tuple[Node, ...]) -> Node:
        value = operand(src, ctx.dtype)
        return value.at(along(at, Const(0))) if value.axes else value.body

    return _replaced(ctx, x, inside, new)


@lifts("index_fill")
def index_fill(ctx: Context, x: Lifted, dim: int, indices: Lifted, value) -> Lifted:
    """where(any_k (i == indices[k]), value, x[i])"""
    dim = dim % len(x.axes)
    inside = lambda at: _is_among(at[dim], indices, x.axes[dim].extent)  # noqa: E731
    return _replaced(ctx, x, inside, lambda at: operand(value, ctx.dtype).body)


@lifts("index_put")
def index_put(ctx: Context, x: Lifted, indices, values: Lifted, accumulate=False) -> Lifted:
    """`x[mask] = value`, `x[:, indices] = value` and `x[i, indices] = value` with i = arange(...), for one value:
    where(mask, value, x), where(any_k (j == indices[k]), value, x), where(j == indices[i], value, x)
    """
    chosen = {dim: at for dim, at in enumerate(indices) if at is not None}
    if accumulate or values.axes or not chosen:
        raise NotLiftable("assignment by index")
    dim = next((d for d in chosen if len(chosen) == 1 or _counts(ctx.node.args[1][d])), None)
    if dim is None or (len(chosen) > 1 and any(len(at.axes) != 1 for at in chosen.values())):
        raise NotLiftable("assignment by several indices")

    def inside(at: tuple[Node, ...]) -> Node:
        if len(chosen) == 1 and chosen[dim].body.dtype is torch.bool:
            return broadcast_at(chosen[dim], at[dim : dim + len(chosen[dim].axes)])
        if len(chosen) == 1:
            return _is_among(at[dim], chosen[dim], x.axes[dim].extent)
        within = apply("lt", at[dim], chosen[dim].axes[0].extent)
        found = (
            apply("eq", at[d], wrapped(broadcast_at(other, (at[dim],)), x.axes[d].extent))
            for d, other in chosen.items()
            if d != dim
        )
        return functools.reduce(lambda a, b: apply("and", a, b), found, within)

    return _replaced(ctx, x, inside, lambda at: values.body)


def _counts(source: fx.Node | None) -> bool:
    """Whether an index is arange(n)."""
    if source is None or source.op != "call_function" or call_name(source) != "arange":
        return False
    made = rule_for(source)(Context(source), *source.args, **source.kwargs)
    return made.body is index(made.axes[0])


def _is_among(i: Node, indices: Lifted, extent: Node) -> Node:
    """any_k (i == indices[k])"""
    axes = fresh_axes(indices.shape)
    return reduce("any", axes, apply("eq", i, wrapped(indices.at(positions(axes)), extent)))
