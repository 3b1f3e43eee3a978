"""Contractions and reductions: matmul and einsum, sums and maxima, softmax and what is made of it."""

from __future__ import annotations

import math
from typing import Callable

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
from rewriter.lift.registry import Context, lifts
from rewriter.lift.values import Lifted, NotLiftable, broadcast_at, fresh_axes, positions


def _mul(a: Node, b: Node) -> Node:
    return apply("mul", a, b)


def contraction(a: Lifted, b: Lifted, shape: tuple[Node, ...]) -> Lifted:
    """sum_k a[..., m, k] * b[..., k, n] over fresh axes of `shape`; leading dimensions broadcast."""
    axes = fresh_axes(shape)
    at = positions(axes)
    k = fresh_axis(a.axes[-1].extent)
    left = at[: len(at) - (len(b.axes) > 1)]
    right = at if len(a.axes) > 1 else at
    x = broadcast_at(a, (*left, index(k)))
    if len(b.axes) == 1:
        y = b.at((index(k),))
    else:
        lead = right[:-2] if len(a.axes) > 1 else right[:-1]
        y = broadcast_at(b, (*lead, index(k), right[-1]))
    return Lifted(axes, reduce("sum", (k,), _mul(x, y)))


@lifts("matmul", "bmm", "mm", "mv", "dot")
def matmul(ctx: Context, a: Lifted, b: Lifted) -> Lifted:
    return contraction(a, b, ctx.shape)


@lifts("baddbmm", "addmm")
def addmm(ctx: Context, bias: Lifted, a: Lifted, b: Lifted, *, beta=1, alpha=1) -> Lifted:
    """beta·bias + alpha·a@b; torch ignores the bias (NaN and all) where beta is 0."""
    product = contraction(a, b, ctx.shape)
    body = _scaled(product.body, alpha)
    if beta != 0:
        body = apply("add", _scaled(broadcast_at(bias, positions(product.axes)), beta), body)
    return Lifted(product.axes, body)


def _scaled(x: Node, factor) -> Node:
    return x if factor == 1 else _mul(x, const(factor, x.dtype))


@lifts("einsum")
def einsum(ctx: Context, equation: str, operands, **kwargs) -> Lifted:
    """Each letter an axis; letters missing in the result are summed."""
    inputs, result = _letters(equation.replace(" ", ""), [len(o.axes) for o in operands])
    extents: dict[str, Node] = {}
    for letters, value in zip(inputs, operands):
        for letter, axis in zip(letters, value.axes):
            if extents.get(letter, Const(1)) is Const(1):
                extents[letter] = axis.extent
    axes = {letter: fresh_axis(extent) for letter, extent in extents.items()}
    at = {letter: index(axis) for letter, axis in axes.items()}
    factors = [broadcast_at(v, tuple(at[x] for x in letters)) for letters, v in zip(inputs, operands)]
    body = factors[0]
    for factor in factors[1:]:
        body = _mul(body, factor)
    summed = tuple(axes[x] for x in extents if x not in result)
    return Lifted(tuple(axes[x] for x in result), reduce("sum", summed, body) if summed else body)


def _letters(equation: str, ranks: list[int]) -> tuple[list[list[str]], list[str]]:
    """Letters per operand and of the result; '...' becomes the letters '0', '1', ... counted from the right."""
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    dots = max((r - len(t.replace("...", "")) for t, r in zip(terms, ranks) if "..." in t), default=0)

    def spell(term: str, rank: int | None) -> list[str]:
        head, ellipsis, tail = term.partition("...")
        if not ellipsis:
            return list(term)
        count = dots if rank is None else rank - len(head) - len(tail)
        return [*head, *(str(count - 1 - k) for k in range(count)), *tail]

    inputs = [spell(t, r) for t, r in zip(terms, ranks)]
    if arrow:
        return inputs, spell(right, None)
    once = sorted({x for t in inputs for x in t if sum(x in u for u in inputs) == 1 and not x.isdigit()})
    return inputs, [*(str(dots - 1 - k) for k in range(dots)), *once]


def _dims(dim, rank: int) -> tuple[int, ...]:
    if dim is None or dim == []:
        return tuple(range(rank))
    return tuple(sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim)))


def fold(
    x: Lifted, dims: tuple[int, ...], keepdim: bool, make: Callable[[tuple[Axis, ...], Node], Node]
) -> Lifted:
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
        if op in ("any", "all") and x.body.dtype is not torch.bool:
            raise NotLiftable(f"{op} of numbers")
        value = ctx.value[0] if isinstance(ctx.value, (tuple, list)) else ctx.value
        dims = _dims(dim, len(x.axes))
        return fold(x, dims, keepdim, lambda axes, body: reduce(op, axes, cast(body, value.dtype)))

    return rule


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


@lifts("max.dim", "min.dim")
def max_dim(ctx: Context, x: Lifted, dim: int, keepdim: bool = False) -> tuple[Lifted | None, ...]:
    """Values only: where the positions are used too, they stay eager."""
    op = ctx.node.target._schema.name.split("::")[1]
    return (_reduction(op)(ctx, x, dim, keepdim), None)


@lifts("mean")
def mean(ctx: Context, x: Lifted, dim=None, keepdim=False, *, dtype=None) -> Lifted:
    dims = _dims(dim, len(x.axes))

    def make(axes: tuple[Axis, ...], body: Node) -> Node:
        count: Node = Const(1)
        for axis in axes:
            count = apply("mul", count, axis.extent)
        return apply("div", reduce("sum", axes, cast(body, ctx.dtype)), cast(count, ctx.dtype))

    return fold(x, dims, keepdim, make)


@lifts("linalg_vector_norm", "norm.ScalarOpt_dim", "norm.ScalarOpt_dim_dtype")
def vector_norm(ctx: Context, x: Lifted, order=2, dim=None, keepdim=False, *, dtype=None) -> Lifted:
    """(sum |x|^p)^(1/p); max |x| and min |x| for infinite p"""
    order = 2.0 if order is None else float(order)

    def make(axes: tuple[Axis, ...], body: Node) -> Node:
        size = apply("abs", cast(body, ctx.dtype))
        if math.isinf(order):
            return reduce("max" if order > 0 else "min", axes, size)
        if order == 1:
            return reduce("sum", axes, size)
        if order == 2:
            return apply("sqrt", reduce("sum", axes, apply("mul", size, size)))
        raise NotLiftable(f"a norm of order {order:g}")

    return fold(x, _dims(dim, len(x.axes)), keepdim, make)


@lifts("cross_entropy_loss")
def cross_entropy(
    ctx: Context, x: Lifted, target: Lifted, weight=None, reduction=1, ignore_index=-100, label_smoothing=0.0
) -> Lifted:
    """−log_softmax(x)[target], smoothed towards the mean over classes; a mean counts what is not ignored."""
    if weight is not None or target.body.dtype.is_floating_point:
        raise NotLiftable("cross-entropy with weights or with probabilities as target")
    at = 1 if len(x.axes) > 1 else 0
    rows = fresh_axes(tuple(a.extent for k, a in enumerate(x.axes) if k != at))
    c = fresh_axis(x.axes[at].extent)

    def scores(label: Node) -> Node:
        i = list(positions(rows))
        return cast(x.at((*i[:at], label, *i[at:])), torch.float32)

    label = target.at(positions(rows))
    counted = apply("ne", label, const(ignore_index))
    safe = where(counted, label, const(0))
    top = reduce("max", (c,), scores(index(c)))
    lse = apply("add", top, apply("log", reduce("sum", (c,), apply("exp", apply("sub", scores(index(c)), top)))))
    loss = apply("sub", lse, scores(safe))
    if label_smoothing:
        mean = apply("div", reduce("sum", (c,), scores(index(c))), cast(c.extent, torch.float32))
        smooth = _mul(apply("sub", lse, mean), const(float(label_smoothing)))
        loss = apply("add", _mul(loss, const(1.0 - label_smoothing)), smooth)
    loss = where(counted, loss, const(0.0))
    if reduction == 0 or not rows:
        return Lifted(rows, cast(loss, ctx.dtype))
    total = reduce("sum", rows, loss)
    if reduction == 1:
        total = apply("div", total, reduce("sum", rows, cast(counted, torch.float32)))
    return Lifted((), cast(total, ctx.dtype))


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


@lifts("softmax", "_softmax")
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


@lifts("log_softmax", "_log_softmax")
def log_softmax(ctx: Context, x: Lifted, dim: int, *args, **kwargs) -> Lifted:
    """x - max x - log sum exp(x - max x)"""

    def make(axes: tuple[Axis, ...], body: Node) -> Node:
        top, e = _stable(body, axes)
        return apply("sub", apply("sub", body, top), apply("log", reduce("sum", axes, e)))

    return _over(_promoted(ctx, x), dim % len(x.axes), make)


@lifts("logsumexp")
def logsumexp(ctx: Context, x: Lifted, dim, keepdim: bool = False) -> Lifted:
    """max x + log sum exp(x - max x), torch's -inf for an empty or all -inf line included."""

    def make(axes: tuple[Axis, ...], body: Node) -> Node:
        top = reduce("max", axes, body)
        shift = where(apply("isinf", top), const(0.0, body.dtype), top)
        total = reduce("sum", axes, apply("exp", apply("sub", body, shift)))
        return apply("add", shift, apply("log", total))

    return fold(x, _dims(dim, len(x.axes)), keepdim, make)


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
    s = _mul(reduce("sum", (d,), _mul(query, key)), cast(factor, query.dtype))
    s = _masked(cast(s, torch.float32), attn_mask, is_causal, (*lead, m, index(n)))
    top, weight = _stable(s, (n,))
    value = broadcast_at(v, (*kv_lead, index(n), e))
    total = reduce("sum", (n,), weight)
    out = cast(reduce("sum", (n,), _mul(apply("div", weight, total), value)), ctx.dtype)
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
