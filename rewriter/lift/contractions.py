"""Contractions: matrix products, dense layers, convolutions over one position, einsum."""

from __future__ import annotations

from rewriter.ir import Const, Node, apply, cast, const, fresh_axis, index, reduce
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


@lifts("matmul", "bmm", "mm", "mv", "dot", "linalg_matmul")
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
    """Each letter an axis; one missing in the result is summed as soon as no operand to come has it, as torch does.

    bis,bjs,bij,bje->bie  →  sum j: (sum s: a[b, i, s] b[b, j, s]) c[b, i, j] d[b, j, e]
    """
    inputs, result = _letters(equation.replace(" ", ""), [len(o.axes) for o in operands])
    extents: dict[str, Node] = {}
    for letters, value in zip(inputs, operands):
        for letter, axis in zip(letters, value.axes):
            if extents.get(letter, Const(1)) is Const(1):
                extents[letter] = axis.extent
    axes = {letter: fresh_axis(extent) for letter, extent in extents.items()}
    at = {letter: index(axis) for letter, axis in axes.items()}
    factors = [broadcast_at(v, tuple(at[x] for x in letters)) for letters, v in zip(inputs, operands)]
    body, left = None, [x for x in extents if x not in result]
    for k, factor in enumerate(factors):
        body = factor if body is None else _mul(body, factor)
        summed = [x for x in left if not any(x in letters for letters in inputs[k + 1 :])]
        left = [x for x in left if x not in summed]
        body = reduce("sum", tuple(axes[x] for x in summed), body) if summed else body
    return Lifted(tuple(axes[x] for x in result), body)


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


@lifts("inner", "vdot", "linalg_vecdot")
def inner(ctx: Context, a: Lifted, b: Lifted, *, dim: int = -1) -> Lifted:
    """inner[.., i, .., j] = sum_k a[.., i, k] · b[.., j, k]; vecdot pairs the rows of a and b"""
    name = ctx.node.target._schema.name.split("::")[1]
    axes = fresh_axes(ctx.shape)
    at = positions(axes)
    if name == "linalg_vecdot" and dim % max(len(a.axes), len(b.axes)) != max(len(a.axes), len(b.axes)) - 1:
        raise NotLiftable("vecdot along another dimension than the last")
    k = fresh_axis(a.axes[-1].extent)
    if name == "linalg_vecdot":
        x, y = broadcast_at(a, (*at, index(k))), broadcast_at(b, (*at, index(k)))
    else:
        rows = len(a.axes) - 1
        x, y = a.at((*at[:rows], index(k))), b.at((*at[rows:], index(k)))
    return Lifted(axes, reduce("sum", (k,), _mul(x, y)))


@lifts("outer", "ger")
def outer(ctx: Context, a: Lifted, b: Lifted) -> Lifted:
    """a[i] · b[j]"""
    axes = fresh_axes(ctx.shape)
    i, j = positions(axes)
    return Lifted(axes, _mul(cast(a.at((i,)), ctx.dtype), cast(b.at((j,)), ctx.dtype)))


@lifts("tensordot")
def tensordot(ctx: Context, a: Lifted, b: Lifted, dims_a, dims_b) -> Lifted:
    """sum over paired dimensions; the others of a come first, then those of b"""
    axes = fresh_axes(ctx.shape)
    rest = iter(positions(axes))
    dims_a, dims_b = ([d % len(x.axes) for d in dims] for x, dims in ((a, dims_a), (b, dims_b)))
    summed = tuple(fresh_axis(a.axes[d].extent) for d in dims_a)
    x = a.at(tuple(index(summed[dims_a.index(d)]) if d in dims_a else next(rest) for d in range(len(a.axes))))
    y = b.at(tuple(index(summed[dims_b.index(d)]) if d in dims_b else next(rest) for d in range(len(b.axes))))
    body = _mul(x, y)
    return Lifted(axes, reduce("sum", summed, body) if summed else body)


@lifts("linear")
def linear(ctx: Context, x: Lifted, weight: Lifted, bias: Lifted | None = None) -> Lifted:
    """sum_d x[.., d] · w[o, d] + b[o]"""
    axes = fresh_axes(ctx.shape)
    at = positions(axes)
    d = fresh_axis(x.axes[-1].extent)
    lead, out = (at[:-1], (at[-1],)) if len(weight.axes) == 2 else (at, ())
    body = reduce("sum", (d,), _mul(x.at((*lead, index(d))), weight.at((*out, index(d)))))
    return Lifted(axes, body if bias is None else apply("add", body, bias.at(out)))


@lifts("conv1d", "conv2d", "conv3d", "convolution")
def convolution(ctx: Context, x: Lifted, weight: Lifted, bias: Lifted | None = None, *options) -> Lifted:
    """A convolution whose kernel is one position wide contracts channels: sum_c x[b, c, ..] · w[o, c, 0, ..] + b[o]"""
    stride, padding = (*options, 1, 0)[:2] if len(options) != 1 else (options[0], 0)
    groups, spatial = _groups(ctx, options), len(weight.axes) - 2
    whole = all(a.extent is Const(1) for a in weight.axes[2:])
    if not whole or _any_but(stride, 1) or not (isinstance(padding, str) or not _any_but(padding, 0)):
        raise NotLiftable("a convolution over more than one position")
    axes = fresh_axes(ctx.shape)
    at = positions(axes)
    out, place = at[-spatial - 1], at[len(at) - spatial :]
    c = fresh_axis(weight.axes[1].extent)
    each = apply("floordiv", weight.axes[0].extent, const(groups))
    first = apply("mul", apply("floordiv", out, each), c.extent)
    value = x.at((*at[: -spatial - 1], apply("add", first, index(c)), *place))
    body = reduce("sum", (c,), _mul(value, weight.at((out, index(c), *(Const(0),) * spatial))))
    return Lifted(axes, body if bias is None else apply("add", body, bias.at((out,))))


def _groups(ctx: Context, options: tuple) -> int:
    """How many parts the channels fall into: the last option."""
    if "convolution" not in ctx.node.target._schema.name:
        return options[3] if len(options) > 3 else 1
    if options[3]:
        raise NotLiftable("a transposed convolution")
    return options[5]


def _any_but(values, number: int) -> bool:
    return any(v != number for v in (values if isinstance(values, (list, tuple)) else [values]))
