"""View ops: index maps, no arithmetic on values."""

from __future__ import annotations

from rewriter.ir import Const, Node, apply, const, where
from rewriter.ir.integer import product, proves
from rewriter.lift.registry import Context, lifts, refuses, scalar
from rewriter.lift.values import (
    Lifted,
    NotLiftable,
    broadcast_at,
    first_of,
    fresh_axes,
    position_of,
    positions,
    remap,
    wrapped,
)
from rewriter.trace.sizes import shape_of


def _dim(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


@lifts("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as")
def view(ctx: Context, x: Lifted, *args, **kwargs) -> Lifted:
    return remap(x, ctx.shape, lambda i: reshaped(x.shape, ctx.shape, i))


def reshaped(old: tuple[Node, ...], new: tuple[Node, ...], indices: tuple[Node, ...]) -> list[Node]:
    """Indices into `old` for `indices` into `new`, both row-major: [b*H + h] -> [b, h] and back.

    Dimensions are matched in the smallest groups of equal size, so most merges and splits stay exact. A view has as
    many elements as it had before: what is left between groups from both ends is a group, too.
    """
    head, i, j = _from_left(old, new, indices)
    tail, p, q = _from_left(old[i:][::-1], new[j:][::-1], indices[j:][::-1], single=True)
    middle = _regroup(old[i : len(old) - p], new[j : len(new) - q], indices[j : len(new) - q])
    return [*head, *middle, *tail[::-1]]


def _from_left(old, new, indices, single: bool = False) -> tuple[list[Node], int, int]:
    """Indices into `old` for the groups found from the left, or for `single` dimensions, and how many dimensions of
    each these are.
    """
    out: list[Node] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [i], [j]
        while not proves("eq", product(old[i : left[-1] + 1]), product(new[j : right[-1] + 1])):
            if single or not _grow(old, new, left, right):
                return out, i, j
        out += _regroup(old[i : left[-1] + 1], new[j : right[-1] + 1], indices[j : right[-1] + 1])
        i, j = min(left[-1] + 1, len(old)), min(right[-1] + 1, len(new))
    return out, i, j


def _grow(old, new, left: list[int], right: list[int]) -> bool:
    """Extends the shorter group by one dimension; False when both are at the end."""
    a, b = product(old[left[0] : left[-1] + 1]), product(new[right[0] : right[-1] + 1])
    can_left, can_right = left[-1] + 1 < len(old), right[-1] + 1 < len(new)
    if can_left and (not can_right or proves("le", a, b)):
        left.append(left[-1] + 1)
    elif can_right:
        right.append(right[-1] + 1)
    else:
        return False
    return True


def _regroup(old: tuple[Node, ...], new: tuple[Node, ...], indices: tuple[Node, ...]) -> list[Node]:
    if len(old) == 1 and len(new) == 1:
        return list(indices)
    flat: Node = Const(0)
    for extent, i in zip(new, indices):
        flat = apply("add", apply("mul", flat, extent), i)
    out: list[Node] = []
    for k, extent in enumerate(old):
        part = apply("floordiv", flat, product(old[k + 1 :]))
        out.append(part if k == 0 else apply("mod", part, extent))
    return out


@lifts("permute")
def permute(ctx: Context, x: Lifted, dims) -> Lifted:
    order = [_dim(d, len(x.axes)) for d in dims]
    return remap(x, ctx.shape, lambda i: [i[order.index(k)] for k in range(len(order))])


@lifts("transpose", "swapaxes", "swapdims")
def transpose(ctx: Context, x: Lifted, a: int, b: int) -> Lifted:
    order = list(range(len(x.axes)))
    a, b = _dim(a, len(order)), _dim(b, len(order))
    order[a], order[b] = order[b], order[a]
    return remap(x, ctx.shape, lambda i: [i[k] for k in order])


@lifts("t", "mT", "matrix_H", "adjoint", "mH")
def matrix_transpose(ctx: Context, x: Lifted) -> Lifted:
    return transpose(ctx, x, -1, -2) if len(x.axes) >= 2 else remap(x, ctx.shape, lambda i: i)


@lifts("numpy_T")
def reverse_dims(ctx: Context, x: Lifted) -> Lifted:
    return remap(x, ctx.shape, lambda i: i[::-1])


@lifts("movedim", "moveaxis")
def movedim(ctx: Context, x: Lifted, source, target) -> Lifted:
    rank = len(x.axes)
    source = [_dim(d, rank) for d in ([source] if isinstance(source, int) else source)]
    target = [_dim(d, rank) for d in ([target] if isinstance(target, int) else target)]
    order: list[int | None] = [None] * rank
    for s, t in zip(source, target):
        order[t] = s
    rest = iter(k for k in range(rank) if k not in source)
    order = [next(rest) if k is None else k for k in order]
    return remap(x, ctx.shape, lambda i: [i[order.index(k)] for k in range(rank)])


@lifts("unsqueeze")
def unsqueeze(ctx: Context, x: Lifted, dim: int) -> Lifted:
    dim = _dim(dim, len(x.axes) + 1)
    return remap(x, ctx.shape, lambda i: i[:dim] + i[dim + 1 :])


@lifts("squeeze")
def squeeze(ctx: Context, x: Lifted, dim=None) -> Lifted:
    dims = range(len(x.axes)) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {_dim(d, len(x.axes)) for d in dims if x.axes[_dim(d, len(x.axes))].extent is Const(1)}

    def mapping(i: tuple[Node, ...]) -> list[Node]:
        rest = iter(i)
        return [Const(0) if k in gone else next(rest) for k in range(len(x.axes))]

    return remap(x, ctx.shape, mapping)


@lifts("expand", "expand_as", "broadcast_to")
def expand(ctx: Context, x: Lifted, *args, **kwargs) -> Lifted:
    axes = fresh_axes(ctx.shape)
    return Lifted(axes, broadcast_at(x, positions(axes)))


@lifts("broadcast_tensors")
def broadcast_tensors(ctx: Context, tensors) -> tuple[Lifted, ...]:
    shape = shape_of(ctx.value[0])
    axes = [fresh_axes(shape) for _ in tensors]
    return tuple(Lifted(a, broadcast_at(x, positions(a))) for a, x in zip(axes, tensors))


@lifts("repeat", "tile")
def repeat(ctx: Context, x: Lifted, repeats) -> Lifted:
    rank = len(x.axes)

    def mapping(i: tuple[Node, ...]) -> list[Node]:
        return [apply("mod", k, a.extent) for k, a in zip(i[len(i) - rank :], x.axes)]

    return remap(x, ctx.shape, mapping)


@lifts("repeat_interleave.self_int")
def repeat_interleave(ctx: Context, x: Lifted, repeats, dim=None, *, output_size=None) -> Lifted:
    times = scalar(repeats)
    if dim is None:
        return remap(x, ctx.shape, lambda i: _regroup(x.shape, x.shape[:1], (apply("floordiv", i[0], times),)))
    dim = _dim(dim, len(x.axes))
    return remap(x, ctx.shape, lambda i: [apply("floordiv", k, times) if d == dim else k for d, k in enumerate(i)])


@lifts("slice")
def slice_(ctx: Context, x: Lifted, dim=0, start=None, end=None, step=1) -> Lifted:
    dim = _dim(dim, len(x.axes))
    first = first_of(scalar(0 if start is None else start), x.axes[dim].extent)
    return _strided(ctx, x, dim, first, scalar(step))


@lifts("narrow")
def narrow(ctx: Context, x: Lifted, dim: int, start, length) -> Lifted:
    dim = _dim(dim, len(x.axes))
    return _strided(ctx, x, dim, position_of(scalar(start), x.axes[dim].extent), Const(1))


def _strided(ctx: Context, x: Lifted, dim: int, first: Node, step: Node) -> Lifted:
    def mapping(i: tuple[Node, ...]) -> list[Node]:
        moved = apply("add", apply("mul", i[dim], step), first)
        return [moved if d == dim else k for d, k in enumerate(i)]

    return remap(x, ctx.shape, mapping)


@lifts("select")
def select(ctx: Context, x: Lifted, dim: int, at) -> Lifted:
    dim = _dim(dim, len(x.axes))
    chosen = position_of(scalar(at), x.axes[dim].extent)
    return remap(x, ctx.shape, lambda i: [*i[:dim], chosen, *i[dim:]])


@lifts("chunk", "split", "split_with_sizes", "tensor_split")
def chunk(ctx: Context, x: Lifted, _sizes, dim: int = 0) -> tuple[Lifted, ...]:
    dim = _dim(dim, len(x.axes))
    out, start = [], Const(0)
    for value in ctx.value:
        shape = shape_of(value)
        first = start
        out.append(remap(x, shape, lambda i: [apply("add", k, first) if d == dim else k for d, k in enumerate(i)]))
        start = apply("add", start, shape[dim])
    return tuple(out)


@lifts("unbind")
def unbind(ctx: Context, x: Lifted, dim: int = 0) -> tuple[Lifted, ...]:
    dim = _dim(dim, len(x.axes))
    return tuple(
        remap(x, shape_of(value), lambda i: [*i[:dim], Const(at), *i[dim:]]) for at, value in enumerate(ctx.value)
    )


@lifts("meshgrid")
def meshgrid(ctx: Context, tensors, *, indexing: str = "ij") -> tuple[Lifted, ...]:
    """Each tensor along a dimension of its own; "xy" has the first two the other way round"""
    place = [1, 0, *range(2, len(tensors))] if indexing == "xy" and len(tensors) > 1 else range(len(tensors))
    shape = shape_of(ctx.value[0])
    return tuple(remap(x, shape, lambda i, d=d, rank=len(x.axes): i[d : d + rank]) for x, d in zip(tensors, place))


@lifts("cat", "concat", "concatenate")
def cat(ctx: Context, tensors, dim: int = 0) -> Lifted:
    """Pieces side by side: `where(i < N, a[i], b[i - N])`; a reduction over i splits there later."""
    dim = _dim(dim, len(ctx.shape))
    axes = fresh_axes(ctx.shape)
    where_at = positions(axes)
    starts = [Const(0)]
    for piece in tensors[:-1]:
        starts.append(apply("add", starts[-1], piece.axes[dim].extent))

    def piece_at(k: int) -> Node:
        moved = apply("sub", where_at[dim], starts[k])
        return tensors[k].at(tuple(moved if d == dim else i for d, i in enumerate(where_at)))

    body = piece_at(len(tensors) - 1)
    for k in reversed(range(len(tensors) - 1)):
        body = where(apply("lt", where_at[dim], starts[k + 1]), piece_at(k), body)
    return Lifted(axes, body)


@lifts("stack")
def stack(ctx: Context, tensors, dim: int = 0) -> Lifted:
    dim = _dim(dim, len(ctx.shape))
    axes = fresh_axes(ctx.shape)
    at = positions(axes)
    rest = at[:dim] + at[dim + 1 :]
    body = tensors[-1].at(rest)
    for k in reversed(range(len(tensors) - 1)):
        body = where(apply("eq", at[dim], Const(k)), tensors[k].at(rest), body)
    return Lifted(axes, body)


@lifts("constant_pad_nd", "pad")
def pad(ctx: Context, x: Lifted, widths, *rest) -> Lifted:
    """Zero (or constant) padding: `where(inside, x[i - before], value)`."""
    value = next((r for r in rest if isinstance(r, (int, float))), 0)
    if rest and isinstance(rest[0], str) and rest[0] != "constant":
        raise NotLiftable(f"padding by {rest[0]}")
    axes = fresh_axes(ctx.shape)
    at = list(positions(axes))
    inside: Node | None = None
    for k in range(len(widths) // 2):
        dim = len(at) - 1 - k
        moved = apply("sub", at[dim], scalar(widths[2 * k]))
        fits = apply("and", apply("ge", moved, Const(0)), apply("lt", moved, x.axes[dim].extent))
        inside = fits if inside is None else apply("and", inside, fits)
        at[dim] = moved
    body = x.at(tuple(at))
    return Lifted(axes, where(inside, body, const(value, body.dtype)))


@lifts("flip")
def flip(ctx: Context, x: Lifted, dims) -> Lifted:
    flipped = {_dim(d, len(x.axes)) for d in dims}

    def mapping(i: tuple[Node, ...]) -> list[Node]:
        last = [apply("sub", a.extent, Const(1)) for a in x.axes]
        return [apply("sub", last[d], k) if d in flipped else k for d, k in enumerate(i)]

    return remap(x, ctx.shape, mapping)


@lifts("roll")
def roll(ctx: Context, x: Lifted, shifts, dims=()) -> Lifted:
    """x[(i - s) mod n]"""
    if not dims:
        raise NotLiftable("a roll of all positions")
    by = dict(zip((_dim(d, len(x.axes)) for d in dims), map(scalar, shifts)))
    if len(by) < len(dims):
        raise NotLiftable("two rolls of one dimension")
    return remap(
        x, ctx.shape, lambda i: [_rolled(k, by[d], n) if d in by else k for d, (k, n) in enumerate(zip(i, x.shape))]
    )


def _rolled(i: Node, shift: Node, extent: Node) -> Node:
    back = apply("neg", shift)
    if proves("le", Const(0), shift):
        back = apply("sub", extent, apply("mod", shift, extent))
    elif not proves("le", Const(0), back):
        raise NotLiftable("a roll in a direction that sizes decide")
    return apply("mod", apply("add", i, back), extent)


@lifts("diagonal")
def diagonal(ctx: Context, x: Lifted, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Lifted:
    """x[..., i, i + offset]; the diagonal is the last dimension"""
    dim1, dim2 = _dim(dim1, len(x.axes)), _dim(dim2, len(x.axes))
    if not isinstance(offset, int):
        raise NotLiftable("a diagonal that sizes decide")

    def mapping(i: tuple[Node, ...]) -> list[Node]:
        place = {
            dim1: apply("add", i[-1], Const(max(-offset, 0))),
            dim2: apply("add", i[-1], Const(max(offset, 0))),
        }
        rest = iter(i[:-1])
        return [place[d] if d in place else next(rest) for d in range(len(x.axes))]

    return remap(x, ctx.shape, mapping)


@lifts("unfold")
def unfold(ctx: Context, x: Lifted, dim: int, size, step) -> Lifted:
    """x[..., i * step + j, ...]; the place in a window is the last dimension"""
    dim = _dim(dim, len(x.axes))

    def mapping(i: tuple[Node, ...]) -> list[Node]:
        moved = apply("add", apply("mul", i[dim], scalar(step)), i[-1])
        return [moved if d == dim else k for d, k in enumerate(i[:-1])]

    return remap(x, ctx.shape, mapping)


refuses("a strided view", "as_strided")


@lifts("embedding")
def embedding(ctx: Context, table: Lifted, indices: Lifted, *args) -> Lifted:
    axes = fresh_axes(ctx.shape)
    at = positions(axes)
    return Lifted(axes, table.at((indices.at(at[:-1]), at[-1])))


@lifts("index_select")
def index_select(ctx: Context, x: Lifted, dim: int, indices: Lifted) -> Lifted:
    dim = _dim(dim, len(x.axes))
    axes = fresh_axes(ctx.shape)
    at = positions(axes)
    return Lifted(axes, x.at((*at[:dim], indices.at((at[dim],)), *at[dim + 1 :])))


@lifts("gather")
def gather(ctx: Context, x: Lifted, dim: int, indices: Lifted, **kwargs) -> Lifted:
    dim = _dim(dim, len(x.axes))
    axes = fresh_axes(ctx.shape)
    at = positions(axes)
    return Lifted(axes, x.at((*at[:dim], indices.at(at), *at[dim + 1 :])))


@lifts("index.Tensor")
def index_tensor(ctx: Context, x: Lifted, indices) -> Lifted:
    """Advanced indexing by integers; the indexed dimensions must be adjacent, as torch then keeps their place."""
    used = [k for k, i in enumerate(indices) if i is not None]
    if any(indices[k].body.dtype.__str__() in ("torch.bool", "torch.uint8") for k in used):
        raise NotLiftable("indexing by a boolean mask: the size of the result depends on data")
    rank = max(len(indices[k].axes) for k in used)
    place = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    axes = fresh_axes(ctx.shape)
    at = positions(axes)
    chosen = at[place : place + rank]
    rest = iter(at[:place] + at[place + rank :])
    index = []
    for k, axis in enumerate(x.axes):
        if k in used:
            index.append(wrapped(broadcast_at(indices[k], chosen), axis.extent))
        else:
            index.append(next(rest))
    return Lifted(axes, x.at(tuple(index)))
