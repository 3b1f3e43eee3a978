"""Ops that read sizes as numbers, composed of ops that do not. Where no size is symbolic, they are what they were."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rewriter.trace.numbers import is_symbolic

_arange, _linspace, _logspace = torch.arange, torch.linspace, torch.logspace
_one_hot, _tril_indices, _triu_indices, _kron = (
    torch.nn.functional.one_hot,
    torch.tril_indices,
    torch.triu_indices,
    torch.kron,
)
_max_pool1d, _take_along_dim = torch.max_pool1d, torch.take_along_dim
_as_tensor, _new_tensor = torch.as_tensor, Tensor.new_tensor
_view, _reshape, _torch_reshape = Tensor.view, Tensor.reshape, torch.reshape
_masked_fill, _masked_fill_, _fill_diagonal_ = Tensor.masked_fill, Tensor.masked_fill_, Tensor.fill_diagonal_


def composed() -> Iterator[tuple[Any, str, Callable]]:
    """(owner, name, what it is while tracing)"""
    yield from (
        (torch, f.__name__, f) for f in (arange, linspace, logspace, tril_indices, triu_indices, kron, as_tensor)
    )
    yield torch, "max_pool1d", max_pool1d
    yield torch.nn.functional, "one_hot", one_hot
    yield from ((owner, "take_along_dim", take_along_dim) for owner in (torch, Tensor))
    yield torch, "reshape", torch_reshape
    yield from (
        (Tensor, f.__name__, f) for f in (view, reshape, kron, new_tensor, masked_fill, masked_fill_, fill_diagonal_)
    )


def _holds_symbols(value: Any) -> bool:
    return any(map(is_symbolic, pytree.tree_leaves(value)))


def arange(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
    """arange(n - 1, -n, -1.0): whole numbers as floats. Their count is one of whole numbers, where the op itself
    rounds a float.
    """
    whole = all(isinstance(a, (int, torch.SymInt)) or (isinstance(a, float) and a.is_integer()) for a in args)
    if _holds_symbols(args) and whole and any(isinstance(a, float) for a in args):
        args, dtype = tuple(int(a) if isinstance(a, float) else a for a in args), dtype or torch.get_default_dtype()
    return _arange(*args, dtype=dtype, **kwargs)


def linspace(start: Any, end: Any, steps: Any, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
    """where(i < n // 2, start + step * i, end - step * (n - 1 - i)), which is how torch rounds it"""
    wanted = dtype or torch.get_default_dtype()
    if not is_symbolic(steps) or not wanted.is_floating_point or isinstance(start, Tensor) or isinstance(end, Tensor):
        return _linspace(start, end, steps, dtype=dtype, **kwargs)
    step = (end - start) / torch.sym_max(steps - 1, 1)
    at = torch.arange(steps, dtype=torch.promote_types(wanted, torch.float32), **kwargs)
    is_first = at < torch.sym_max(steps // 2, 1)
    return torch.where(is_first, at * step + start, (at - (steps - 1)) * step + end).to(wanted)


def logspace(start: Any, end: Any, steps: Any, base: float = 10.0, **kwargs: Any) -> Tensor:
    """base ** linspace(start, end, n)"""
    if not is_symbolic(steps):
        return _logspace(start, end, steps, base, **kwargs)
    return base ** torch.linspace(start, end, steps, **kwargs)


def tril_indices(row: Any, col: Any, offset: int = 0, *, dtype=torch.long, **kwargs: Any) -> Tensor:
    """[i, j] of the entries of a square on and below a diagonal that starts in its first column, row by row"""
    if not _holds_symbols((row, col)) or is_symbolic(offset) or offset > 0 or not _is_same(row, col):
        return _tril_indices(row, col, offset, dtype=dtype, **kwargs)
    i, j, _ = _triangle(row + offset, **kwargs)
    return torch.stack([i - offset, j]).to(dtype)


def triu_indices(row: Any, col: Any, offset: int = 0, *, dtype=torch.long, **kwargs: Any) -> Tensor:
    """[i, j] of the entries of a square on and above a diagonal that starts in its first row: those below, turned"""
    if not _holds_symbols((row, col)) or is_symbolic(offset) or offset < 0 or not _is_same(row, col):
        return _triu_indices(row, col, offset, dtype=dtype, **kwargs)
    i, j, last = _triangle(row - offset, **kwargs)
    return torch.stack([last - i, last - j + offset]).flip(1).to(dtype)


def _is_same(row: Any, col: Any) -> bool:
    return is_symbolic(row) and is_symbolic(col) and row.node.expr == col.node.expr


def _triangle(size: torch.SymInt, **kwargs: Any) -> tuple[Tensor, Tensor, Any]:
    """Rows and columns of the entries of a lower triangle, row by row, and the last row: entry t = i * (i + 1) / 2 + j"""
    size = torch.sym_max(size, 0)
    entry = torch.arange(size * (size + 1) // 2, **kwargs)
    i = (((8 * entry + 1).double().sqrt() - 1) / 2).floor().long()
    return i, entry - i * (i + 1) // 2, size - 1


def kron(a: Tensor, b: Tensor) -> Tensor:
    """a[i // m, j // n] * b[i % m, j % n]"""
    if not _holds_symbols((tuple(a.shape), tuple(b.shape))):
        return _kron(a, b)
    rank = max(a.dim(), b.dim())
    a, b = (x[(None,) * (rank - x.dim()) + (...,)] for x in (a, b))
    product = a[(slice(None), None) * rank] * b[(None, slice(None)) * rank]
    return product.reshape([m * n for m, n in zip(a.shape, b.shape)])


def one_hot(x: Tensor, num_classes: Any = -1) -> Tensor:
    """x[..., None] == arange(n)"""
    if not is_symbolic(num_classes):
        return _one_hot(x, num_classes)
    return (x[..., None] == torch.arange(num_classes, device=x.device)).long()


def take_along_dim(x: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """gather, of both as large as each other but along `dim`"""
    if dim is None or x.dim() != indices.dim() or not _holds_symbols((tuple(x.shape), tuple(indices.shape))):
        return _take_along_dim(x, indices, dim)
    dim = dim % x.dim()
    both = [b if isinstance(a, int) and a == 1 else a for a, b in zip(x.shape, indices.shape)]
    wanted, held = ([*both[:dim], t.shape[dim], *both[dim + 1 :]] for t in (indices, x))
    return x.expand(held).gather(dim, indices.expand(wanted))


def max_pool1d(x: Tensor, kernel_size, stride=(), padding=0, dilation=1, ceil_mode: bool = False) -> Tensor:
    """That of rows of pixels"""
    if not _holds_symbols(tuple(x.shape)):
        return _max_pool1d(x, kernel_size, stride, padding, dilation, ceil_mode)
    size, step, pad, apart = (
        v[0] if isinstance(v, (tuple, list)) and v else v for v in (kernel_size, stride, padding, dilation)
    )
    pooled = torch.max_pool2d(x.unsqueeze(-2), (1, size), (1, step or size), (0, pad), (1, apart), ceil_mode)
    return pooled.squeeze(-2)


def view(x: Tensor, *shape: Any, **kwargs: Any) -> Tensor:
    """x.view(b, 8, n // 8, -1): what is left is d, as an expression of sizes only b * n * d // (b * 8 * (n // 8))."""
    return _view(x, *_inferred(x, shape), **kwargs)


def reshape(x: Tensor, *shape: Any, **kwargs: Any) -> Tensor:
    """Likewise"""
    return _reshape(x, *_inferred(x, shape), **kwargs)


def torch_reshape(input: Tensor, shape: Any) -> Tensor:
    """Likewise"""
    return _torch_reshape(input, *_inferred(input, (shape,)))


def _inferred(x: Tensor, shape: tuple) -> tuple:
    """A shape as it was given, its -1 the dimension of `x` that the other entries leave, if that is easily seen."""
    entries = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
    unknown = [k for k, n in enumerate(entries) if isinstance(n, int) and n == -1]
    if len(unknown) != 1 or not all(map(_is_size, entries)) or not _holds_symbols((tuple(x.shape), tuple(entries))):
        return shape
    own, given = list(x.shape), entries[: unknown[0]] + entries[unknown[0] + 1 :]
    for n, count, part in itertools.product(x.shape, given, given):
        left = _holds(own, n) and _holds(given, count) and _holds(given, part)
        if left and is_symbolic(n) and isinstance(count, int) and is_symbolic(part) and _is_equal(n // count, part):
            own, given = _without(own, n), _without(_without(given, count), part)
    for size in given:
        own, given = (_without(own, size), _without(given, size)) if _holds(own, size) else (own, given)
    return shape if given else (*entries[: unknown[0]], math.prod(own), *entries[unknown[0] + 1 :])


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt))


def _is_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are the same expression: whether they are equal numbers is not asked."""
    if is_symbolic(a) != is_symbolic(b):
        return False
    return a.node.expr == b.node.expr if is_symbolic(a) else a == b


def _holds(sizes: list[Any], size: Any) -> bool:
    return any(_is_equal(size, n) for n in sizes)


def _without(sizes: list[Any], size: Any) -> list[Any]:
    """All but the first that is equal."""
    k = next((k for k, n in enumerate(sizes) if _is_equal(size, n)), len(sizes))
    return sizes[:k] + sizes[k + 1 :]


def as_tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """as_tensor(n): `tensor` takes sizes as they are."""
    make = torch.tensor if _holds_symbols(data) else _as_tensor
    return make(data, dtype=dtype, device=device)


def new_tensor(x: Tensor, data: Any, **kwargs: Any) -> Tensor:
    """x.new_tensor(n), likewise"""
    if _holds_symbols(data):
        return torch.tensor(data, **{"dtype": x.dtype, "device": x.device, **kwargs})
    return _new_tensor(x, data, **kwargs)


def masked_fill(x: Tensor, mask: Tensor, value: Any) -> Tensor:
    """x.masked_fill(mask, n ** 0.5), likewise"""
    return _masked_fill(x, mask, torch.tensor(value, dtype=x.dtype) if is_symbolic(value) else value)


def masked_fill_(x: Tensor, mask: Tensor, value: Any) -> Tensor:
    """In place."""
    return _masked_fill_(x, mask, torch.tensor(value, dtype=x.dtype) if is_symbolic(value) else value)


def fill_diagonal_(x: Tensor, fill_value: Any, wrap: bool = False) -> Tensor:
    """where(i == j, fill_value, x)"""
    if wrap or x.dim() != 2:
        return _fill_diagonal_(x, fill_value, wrap)
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
    return x.masked_fill_(rows[:, None] == columns, fill_value)
