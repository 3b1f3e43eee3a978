"""Tensors made from positions and constants: arange, full, tril ... They are never stored."""

from __future__ import annotations

from rewriter.ir import Const, Node, apply, cast, const, where
from rewriter.lift.registry import Context, lifts, scalar
from rewriter.lift.values import Lifted, NotLiftable, fresh_axes, positions


@lifts("arange", "arange.start", "arange.start_step")
def arange(ctx: Context, *args, **kwargs) -> Lifted:
    start, step = (args[0] if len(args) > 1 else 0), (args[2] if len(args) > 2 else kwargs.get("step", 1))
    axes = fresh_axes(ctx.shape)
    at = positions(axes)[0]
    body = apply("add", apply("mul", cast_like(at, step), scalar(step)), scalar(start))
    return Lifted(axes, cast(body, ctx.dtype))


def cast_like(node: Node, number) -> Node:
    return cast(node, const(number).dtype) if isinstance(number, float) else node


def _filled(ctx: Context, value) -> Lifted:
    return Lifted(fresh_axes(ctx.shape), cast(scalar(value), ctx.dtype))


@lifts("full", "full_like", "new_full")
def full(ctx: Context, *args, **kwargs) -> Lifted:
    position = 2 if ctx.node.target._schema.name.endswith("new_full") else 1
    return _filled(ctx, args[position] if len(args) > position else kwargs["fill_value"])


@lifts("zeros", "zeros_like", "new_zeros")
def zeros(ctx: Context, *args, **kwargs) -> Lifted:
    return _filled(ctx, 0)


@lifts("ones", "ones_like", "new_ones")
def ones(ctx: Context, *args, **kwargs) -> Lifted:
    return _filled(ctx, 1)


@lifts("scalar_tensor")
def scalar_tensor(ctx: Context, value, **kwargs) -> Lifted:
    return _filled(ctx, value)


@lifts("fill", "fill.Scalar")
def fill(ctx: Context, x, value) -> Lifted:
    if not isinstance(value, Lifted):
        return _filled(ctx, value)
    return Lifted(fresh_axes(ctx.shape), cast(value.body, ctx.dtype))


@lifts("eye", "eye.m")
def eye(ctx: Context, *args, **kwargs) -> Lifted:
    axes = fresh_axes(ctx.shape)
    i, j = positions(axes)
    return Lifted(axes, where(apply("eq", i, j), const(1, ctx.dtype), const(0, ctx.dtype)))


@lifts("one_hot")
def one_hot(ctx: Context, x: Lifted, *args) -> Lifted:
    """1 where x == the last position, 0 elsewhere"""
    axes = fresh_axes(ctx.shape)
    *at, last = positions(axes)
    return Lifted(axes, where(apply("eq", x.at(tuple(at)), last), const(1, ctx.dtype), const(0, ctx.dtype)))


@lifts("diag", "diag_embed")
def diag_embed(ctx: Context, x: Lifted, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Lifted:
    """A matrix of zeros with `x` on a diagonal: where(j - i == offset, x[min(i, j)], 0)"""
    if len(ctx.shape) != len(x.axes) + 1 or (dim1, dim2) != (-2, -1) or not isinstance(offset, int):
        raise NotLiftable("a diagonal of this form")
    axes = fresh_axes(ctx.shape)
    *lead, i, j = positions(axes)
    body = x.at((*lead, i if offset >= 0 else j))
    on = apply("eq", apply("sub", j, i), scalar(offset))
    return Lifted(axes, where(on, body, const(0, body.dtype)))


def _triangle(ctx: Context, x: Lifted, keep) -> Lifted:
    axes = fresh_axes(ctx.shape)
    at = positions(axes)
    body = x.at(at)
    zero = const(0, body.dtype)
    return Lifted(axes, where(keep(at[-2], at[-1]), body, zero))


@lifts("tril")
def tril(ctx: Context, x: Lifted, diagonal=0) -> Lifted:
    return _triangle(ctx, x, lambda i, j: apply("le", j, apply("add", i, scalar(diagonal))))


@lifts("triu")
def triu(ctx: Context, x: Lifted, diagonal=0) -> Lifted:
    return _triangle(ctx, x, lambda i, j: apply("le", apply("add", i, scalar(diagonal)), j))


__all__ = ["Const"]
