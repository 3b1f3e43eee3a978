"""Calls that tracing would refuse or fix to a size, traced as what they mean.

A program that calls them decides nothing here: a guard that their stand-ins cause is one of the user's line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch.torch_version import TorchVersion

SLICES_LOSE_LENGTHS = TorchVersion(torch.__version__) < "2.12"  # also where only the size is no number
_arange = torch.arange
_getitem = torch.Tensor.__getitem__
_setitem = torch.Tensor.__setitem__
_attention = torch.nn.functional.scaled_dot_product_attention
_fill_diagonal_ = torch.Tensor.fill_diagonal_


@contextmanager
def spelled() -> Iterator[None]:
    """While active, the calls are what they mean. Functions are replaced: argument parsing comes before any tracing
    hook.
    """
    torch.nn.functional.scaled_dot_product_attention = attention
    torch.Tensor.fill_diagonal_ = fill_diagonal_
    torch.Tensor.__getitem__ = getitem
    if SLICES_LOSE_LENGTHS:
        torch.Tensor.__setitem__ = setitem
    torch.arange = arange
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = _attention
        del torch.Tensor.fill_diagonal_
        del torch.Tensor.__getitem__
        if SLICES_LOSE_LENGTHS:
            del torch.Tensor.__setitem__
        torch.arange = _arange


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: Any = False,
    **kwargs: Any,
) -> torch.Tensor:
    """`is_causal=length > 1` is a branch of the program: decided while tracing, and guarded as any other."""
    return _attention(query, key, value, attn_mask, dropout_p, bool(is_causal), **kwargs)


def fill_diagonal_(x: torch.Tensor, fill_value: Any, wrap: bool = False) -> torch.Tensor:
    """where(i == j, fill_value, x): the op itself reads the sizes as numbers."""
    if wrap or x.dim() != 2:
        return _fill_diagonal_(x, fill_value, wrap)
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
    return x.masked_fill_(rows[:, None] == columns, fill_value)


def arange(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
    """arange(n - 1, -n, -1.0): whole numbers as floats. Their count is one of whole numbers, where the op itself
    rounds a float.
    """
    symbolic = any(isinstance(a, torch.SymInt) for a in args)
    whole = all(isinstance(a, (int, torch.SymInt)) or (isinstance(a, float) and a.is_integer()) for a in args)
    if symbolic and whole and any(isinstance(a, float) for a in args):
        args, dtype = tuple(int(a) if isinstance(a, float) else a for a in args), dtype or torch.get_default_dtype()
    return _arange(*args, dtype=dtype, **kwargs)


def getitem(x: torch.Tensor, at: Any) -> torch.Tensor:
    """x[..., a:b] with a length that is known: the op itself compares bounds and sizes as they stand, and where that
    tells nothing the length is unknown from there on.
    """
    return _getitem(*_narrowed(x, at))


def setitem(x: torch.Tensor, at: Any, value: Any) -> None:
    """x[..., a:b] = value, likewise"""
    _setitem(*_narrowed(x, at), value)


def _narrowed(x: torch.Tensor, at: Any) -> tuple[torch.Tensor, Any]:
    """A view without what slices leave out, and what is left of the index."""
    entries = list(at) if isinstance(at, tuple) else [at]
    for k, dim in _dimensions(entries, x.dim()).items():
        size, entry = x.shape[dim], entries[k]
        numbers = (size, entry.start, entry.stop)
        if entry == slice(None) or entry.step not in (None, 1) or not any(isinstance(n, torch.SymInt) for n in numbers):
            continue
        start, stop = (_inside(n, size) for n in (entry.start or 0, size if entry.stop is None else entry.stop))
        if start is None or stop is None or not (SLICES_LOSE_LENGTHS or _is_plain(entry, start, stop)):
            continue
        length = stop - start if _is_nonnegative(stop - start) else torch.sym_max(stop - start, 0)
        x, entries[k] = x.narrow(dim, start, length), slice(None)
    return x, tuple(entries)


def _inside(bound: int | torch.SymInt, size: int | torch.SymInt) -> int | torch.SymInt | None:
    """A bound of a slice as a position from 0 to the size; None where its sign depends on sizes."""
    if _is_nonnegative(-bound - 1):
        return size + bound if _is_nonnegative(size + bound) else torch.sym_max(size + bound, 0)
    if not _is_nonnegative(bound):
        return None
    return bound if _is_nonnegative(size - bound) else torch.sym_min(bound, size)


def _is_plain(entry: slice, start: int | torch.SymInt, stop: int | torch.SymInt) -> bool:
    """Whether bounds are what they say at all sizes, and one is no number: others the op gets right."""
    bounds = [n for n in (entry.start, entry.stop) if n is not None]
    return any(isinstance(n, torch.SymInt) for n in bounds) and all(any(n is m for m in (start, stop)) for n in bounds)


def _dimensions(entries: list, rank: int) -> dict[int, int]:
    """The dimension of each slice; of none where an entry takes several."""
    if not all(e is None or e is Ellipsis or isinstance(e, (slice, int)) for e in entries):
        return {}
    taken = sum(isinstance(e, (slice, int)) for e in entries)
    out, dim = {}, 0
    for k, entry in enumerate(entries):
        if isinstance(entry, slice):
            out[k] = dim
        dim += rank - taken if entry is Ellipsis else entry is not None
    return out


def _is_nonnegative(number: int | torch.SymInt) -> bool:
    """Whether a number is at least 0 at all sizes."""
    if isinstance(number, int):
        return number >= 0
    return any(form(number.node.expr).is_nonnegative for form in (sympy.expand, sympy.factor))
